"""Mixtures of experts of two layers: which expert of A stands for which of B's.

An expert's index means nothing, nor does the order of its neurons. Experts are therefore compared
by what they compute, and are moved as wholes, each with its row of the router.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from opt_deus_jax.errors import UserError
from opt_deus_jax.models.block import ACTIVATIONS
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.transport.assignment import assign_by_cost
from opt_deus_jax.transport.diagnostics import MatrixReport
from opt_deus_jax.upscaling.blending import restore_rows
from opt_deus_jax.upscaling.features import NEURON_MATRICES
from opt_deus_jax.upscaling.layout import LayerOrigin
from opt_deus_jax.upscaling.neurons import add_overlap, turn_into_square_distances
from opt_deus_jax.upscaling.new_block import Block

EXPERT_PARAMETERS = ("router_kernel", *(f"experts_{name}_kernel" for name in NEURON_MATRICES))
_PROBES = 256
Arrays = Mapping[str, Array] | Block
# Fuses a matrix of an expert of A, given by its name, with that of one of B.
FusePair = Callable[[str, Array, Array], tuple[Array, MatrixReport]]


class ExpertMatch(NamedTuple):
    """Which experts of A stand for B's.

    Attributes:
        source_E: For each expert of B its expert of A.
        mean_cost: Mean distance of an expert of A from one of B.
        matched_cost: The same of the matched ones.
    """

    source_E: Int[np.ndarray, " e"]
    mean_cost: float
    matched_cost: float

    @property
    def map_EE(self) -> Float[np.ndarray, "e e"]:
        """The permutation, to be applied as `map.T @ rows of A`."""
        return np.eye(len(self.source_E), dtype=np.float32)[:, self.source_E]


def check_parents(config: ModelConfig, weights: str, layers: Sequence[LayerOrigin]) -> None:
    """Refuses to mix a layer with experts and one without.

    Args:
        config: The base.
        weights: How new layers are made, as `Method.weights`.
        layers: From `plan_layers`.

    Raises:
        UserError: The two parents of a new layer are not alike.
    """
    if weights not in ("transport", "average"):
        return
    for layer in layers:
        if layer.previous is None or layer.next is None:
            continue
        below, above = (config.layer_kinds[p].has_experts for p in (layer.previous, layer.next))
        if below != above:
            raise UserError(
                f"config field upscale.layout: new layer {layer.depth} would mix base layers "
                f"{layer.previous} and {layer.next}, of which only one has experts; give other "
                "upscale.gaps, or a method that copies one of the two"
            )


def expert_block(block: Block, expert: int) -> dict[str, np.ndarray]:
    """One expert as the MLP of a block, with the norm that it reads behind."""
    kernels = {
        f"{name}_kernel": block[f"experts_{name}_kernel"][expert] for name in NEURON_MATRICES
    }
    return kernels | {"post_attention_norm": block["post_attention_norm"]}


def stack_expert_blocks(blocks: Sequence[Block]) -> dict[str, np.ndarray]:
    """Undoes `expert_block` for all experts; the norm is not among what comes back."""
    return {
        f"experts_{name}_kernel": np.stack([block[f"{name}_kernel"] for block in blocks])
        for name in NEURON_MATRICES
    }


def _answers(block: Arrays, config: ModelConfig) -> Float[np.ndarray, "e a"]:
    """What each expert makes of the same random tokens, as they come out of a norm."""
    drawn = np.random.default_rng(0).standard_normal((_PROBES, config.width)).astype(np.float32)
    x_PD = jnp.asarray(drawn * np.asarray(block["post_attention_norm"]))

    def read(x_PD: Array, kernel_OD: Array) -> Array:
        return jnp.matmul(x_PD, kernel_OD.T, precision=jax.lax.Precision.HIGHEST)

    def answer(gate_FD: Array, up_FD: Array, down_DF: Array) -> Array:
        gated_PF = ACTIVATIONS[config.activation](read(x_PD, gate_FD)) * read(x_PD, up_FD)
        return read(gated_PF, down_DF)

    kernels = (jnp.asarray(block[f"experts_{name}_kernel"]) for name in NEURON_MATRICES)
    answers_EPD = jax.lax.map(lambda kernel: answer(*kernel), tuple(kernels))
    return np.asarray(answers_EPD).reshape(len(answers_EPD), -1)


def match_experts(previous: Arrays, next_: Arrays, config: ModelConfig) -> ExpertMatch:
    """Finds the permutation of A's experts that is nearest to B's.

    The squared distance of two experts is that of their answers to random tokens plus that of their
    rows of the router, both scaled so that those of all experts together have norm 1. Where neurons
    stand within an expert does not matter.

    Args:
        previous: Block A, norms as they are applied.
        next_: Block B, likewise.
        config: The network.

    Returns:
        The match, exact.
    """
    rows = [
        (
            _answers(block, config),
            np.asarray(block["router_kernel"]) * np.asarray(block["post_attention_norm"]),
        )
        for block in (previous, next_)
    ]
    table_EE = np.zeros((len(rows[0][0]), len(rows[1][0])))
    squares = [add_overlap(table_EE, of_a, of_b) for of_a, of_b in zip(*rows, strict=True)]
    square_EE = turn_into_square_distances(table_EE, squares)
    source_E = assign_by_cost(square_EE)
    cost_EE = np.sqrt(square_EE)
    matched = cost_EE[source_E, np.arange(len(source_E))]
    return ExpertMatch(source_E, float(cost_EE.mean()), float(matched.mean()))


def fuse_experts(
    previous: Arrays,
    next_: Arrays,
    config: ModelConfig,
    matrices: Sequence[str],
    fusion: str,
    fuse_pair: FusePair,
) -> tuple[dict[str, Array], list[MatrixReport], Float[np.ndarray, "e e"]]:
    """Matches experts and fuses each pair, matrix by matrix; rows of the router follow the match.

    Args:
        previous: Block A, norms as they are applied.
        next_: Block B, likewise.
        config: The network.
        matrices: Of gate, up and down.
        fusion: `mean` or `rescaled` (`blending.FUSIONS`).
        fuse_pair: Fuses two kernels.

    Returns:
        Kernels of experts and router by parameter name; a report of the router, whose gain is that
        of the match, and one of each matrix over all experts; the map of the match.
    """
    match = match_experts(previous, next_, config)
    router_a, router_b = (np.asarray(block["router_kernel"]) for block in (previous, next_))
    router = (router_a[match.source_E] + router_b) / 2
    if fusion == "rescaled":
        router = restore_rows(router, router_b)
    fused = {"router_kernel": jnp.asarray(router)}
    reports = [report_match(match, router, router_a, router_b)]
    for name in matrices:
        key = f"experts_{name}_kernel"
        pairs = [
            fuse_pair(name, *map(jnp.asarray, (previous[key][source], next_[key][target])))
            for target, source in enumerate(match.source_E.tolist())
        ]
        fused[key] = jnp.stack([kernel for kernel, _ in pairs])
        reports.append(merge_reports(f"experts {name}", [line for _, line in pairs]))
    return fused, reports, match.map_EE


def report_match(
    match: ExpertMatch, router: np.ndarray, previous: np.ndarray, next_: np.ndarray
) -> MatrixReport:
    """The report of the router, whose rows went with the experts.

    Args:
        match: Of the experts.
        router: The fused rows.
        previous: A's.
        next_: B's.

    Returns:
        Gain and order are those of the match.
    """
    norm, norm_a, norm_b = (
        float(np.linalg.norm(rows)) or 1.0 for rows in (router, previous, next_)
    )
    return MatrixReport(
        name="router",
        converged=True,
        iterations=0,
        marginal_error=0.0,
        effective_sources=1.0,
        norm_ratio_previous=norm / norm_a,
        norm_ratio_next=norm / norm_b,
        match_gain=match.matched_cost / match.mean_cost if match.mean_cost else 1.0,
        match_order=tuple(match.source_E.tolist()),
    )


def merge_reports(name: str, lines: Sequence[MatrixReport]) -> MatrixReport:
    """One report for the same matrix of all experts.

    Args:
        name: Of the matrix.
        lines: One an expert.

    Returns:
        The worst of the solver's figures and the means of the others, without an order of rows.
    """

    def mean(field: str) -> float:
        return float(np.mean([getattr(line, field) for line in lines]))

    return dataclasses.replace(
        lines[0],
        name=name,
        converged=all(line.converged for line in lines),
        iterations=max(line.iterations for line in lines),
        marginal_error=max(line.marginal_error for line in lines),
        effective_sources=mean("effective_sources"),
        norm_ratio_previous=mean("norm_ratio_previous"),
        norm_ratio_next=mean("norm_ratio_next"),
        match_gain=mean("match_gain"),
        match_order=(),
    )
