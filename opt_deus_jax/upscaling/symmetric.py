"""Fusion after an alignment that leaves the function of block A exactly as it is.

A's heads and neurons are laid on B's by symmetries of the network only. Nothing moves on the
residual stream, whose basis adjacent layers share.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy import sparse

from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.transport.diagnostics import MatrixReport, report, report_map
from opt_deus_jax.upscaling.blending import blend_rows, shares_of_previous
from opt_deus_jax.upscaling.experts import (
    EXPERT_PARAMETERS,
    expert_block,
    match_experts,
    merge_reports,
    report_match,
    stack_expert_blocks,
)
from opt_deus_jax.upscaling.features import (
    HEAD_MATRICES,
    NEURON_MATRICES,
    NORMS,
    Features,
    UnitMatch,
    check_parameters,
    fold_features,
    shift_norms,
    unfold_features,
)
from opt_deus_jax.upscaling.heads import match_heads
from opt_deus_jax.upscaling.neurons import match_neurons
from opt_deus_jax.upscaling.new_block import Block, Fused, OnRead, TransportMap

_QUERY_KEY_NORMS = ("query_norm", "key_norm")
_OTHERS_OF_HEADS = (*_QUERY_KEY_NORMS, "output_bias", "attention_output_norm")
_OTHERS_OF_NEURONS = ("down_bias", "mlp_output_norm")
_ROUTER = "router_kernel"
_FIELD = "config field upscale.transport='symmetric'"


class _Side(NamedTuple):
    """Attention, the MLP or one of several: what its units are and how they are matched."""

    units_name: str
    units: int
    matrices: tuple[str, ...]
    others: tuple[str, ...]
    match: Callable[[Features, Features], UnitMatch]


class _FusedSide(NamedTuple):
    parameters: dict[str, np.ndarray]
    reports: list[MatrixReport]
    maps: dict[str, TransportMap]
    share_U: np.ndarray


def _sides(block: Block, config: ModelConfig, epsilon: float | None) -> tuple[_Side, _Side]:
    """Heads, and the neurons of an MLP, for blocks with the parameters of this one."""
    others, width = _OTHERS_OF_NEURONS, config.mlp_width
    if config.experts is not None and _ROUTER in block:
        others, width = EXPERT_PARAMETERS, config.experts.width
    check_parameters(block, _FIELD, _OTHERS_OF_HEADS + others)

    def heads(a: Features, b: Features) -> UnitMatch:
        return match_heads(a, b, config)

    def neurons(a: Features, b: Features) -> UnitMatch:
        return match_neurons(a, b, epsilon)

    return (
        _Side("heads", config.num_kv_heads, HEAD_MATRICES, _OTHERS_OF_HEADS, heads),
        _Side("neurons", width, NEURON_MATRICES, _OTHERS_OF_NEURONS, neurons),
    )


def align_block(previous: Block, next_: Block, config: ModelConfig) -> dict[str, np.ndarray]:
    """Lays block A on block B without changing what A computes.

    Args:
        previous: A, float32 arrays by the names of `block_specs`.
        next_: B, likewise.
        config: The network.

    Returns:
        A in B's order of heads and neurons, turned nearest to B; with A's own norms.

    Raises:
        UserError: The block has parameters whose symmetries are not known here.
    """
    heads, neurons = _sides(previous, config, None)
    offset = config.norm.offset
    previous, next_ = shift_norms(previous, offset), shift_norms(next_, offset)
    aligned = dict(previous) | _align_side(heads, previous, next_)
    if _ROUTER not in previous:
        return dict(shift_norms(aligned | _align_side(neurons, previous, next_), -offset))
    source_E = match_experts(previous, next_, config).source_E
    pairs = zip(*_paired_experts(previous, next_, source_E), strict=True)
    aligned |= stack_expert_blocks([_align_side(neurons, a, b) for a, b in pairs])
    aligned[_ROUTER] = previous[_ROUTER][source_E]
    return dict(shift_norms(aligned, -offset))


def _paired_experts(
    previous: Block, next_: Block, source_E: np.ndarray
) -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    of_a = [expert_block(previous, source) for source in source_E.tolist()]
    return of_a, [expert_block(next_, target) for target in range(len(of_a))]


def _align_side(side: _Side, previous: Block, next_: Block) -> dict[str, np.ndarray]:
    a, b = (fold_features(block, side.matrices) for block in (previous, next_))
    match = side.match(a, b)
    moved = {name: match.maps[name].T @ rows for name, rows in a.items()}
    aligned = unfold_features(moved, previous, previous)
    others = (name for name in side.others if name in previous)
    return aligned | {name: _moved(name, previous, match) for name in others}


def _moved(name: str, previous: Block, match: UnitMatch) -> np.ndarray:
    """A parameter beside the features: a norm over all heads follows their order, others stay."""
    if name not in _QUERY_KEY_NORMS:
        return previous[name]
    map_MN = abs(match.maps[name.removesuffix("_norm")])
    # Signs do not reach a scale; one for each dimension of a head is shared by all heads.
    return map_MN.T @ previous[name] if map_MN.shape == 2 * previous[name].shape else previous[name]


def _fused_norms(previous: Block, next_: Block) -> dict[str, np.ndarray]:
    """Root mean squares with B's sign, which no kernel is enlarged by being divided by."""
    return {
        name: np.copysign(np.sqrt((previous[name] ** 2 + next_[name] ** 2) / 2), next_[name])
        for name in NORMS
        if name in next_
    }


def fuse_symmetric(
    previous: Block,
    next_: Block,
    *,
    config: ModelConfig,
    fusion: str,
    epsilon: float | None = None,
) -> Fused:
    """Aligns A to B by symmetries of the network and fuses the two, feature by feature.

    Experts are matched as wholes first, then neurons within each pair.

    Args:
        previous: Parent A, float32 arrays by the names of `block_specs`.
        next_: Parent B, likewise.
        config: The network.
        fusion: A name of `blending.FUSIONS`.
        epsilon: None matches neurons exactly; else see `match_neurons`. Heads always are.

    Returns:
        The new block, its outputs not zeroed; a report for each matrix, for heads (in groups with
        their KV head) and for neurons; the maps.

    Raises:
        UserError: The block has parameters whose symmetries are not known here.
    """
    heads, neurons = _sides(previous, config, epsilon)
    offset = config.norm.offset
    previous, next_ = shift_norms(previous, offset), shift_norms(next_, offset)
    norms = _fused_norms(previous, next_)
    fuse = functools.partial(_fuse_side, norms=norms, fusion=fusion)
    attention = fuse(heads, previous, next_)
    if _ROUTER in previous:
        match = match_experts(previous, next_, config)
        pairs = zip(*_paired_experts(previous, next_, match.source_E), strict=True)
        mlp = _join_experts([fuse(neurons, a, b) for a, b in pairs])
        router_a, router_b = (
            fold_features(block, ("router",))["router"] for block in (previous, next_)
        )
        rows = blend_rows(fusion, router_a[match.source_E], router_b, mlp.share_U)
        mlp.parameters.update(unfold_features({"router": rows}, norms, next_))
        mlp.reports.insert(0, report_match(match, rows, router_a, router_b))
        mlp.maps["router"] = match.map_EE
    else:
        mlp = fuse(neurons, previous, next_)
    fused = shift_norms(attention.parameters | mlp.parameters, -offset)
    return Fused(
        {name: fused[name] for name in next_},
        (*attention.reports, *mlp.reports),
        attention.maps | mlp.maps,
    )


def _fuse_side(
    side: _Side, previous: Block, next_: Block, *, norms: Block, fusion: str
) -> _FusedSide:
    a, b = (fold_features(block, side.matrices) for block in (previous, next_))
    match = side.match(a, b)
    moved = OnRead(lambda name: match.maps[name].T @ a[name], a)
    share = shares_of_previous(fusion, moved, b, side.units)
    fused: dict[str, np.ndarray] = {}
    lines = []
    for name in side.matrices:
        rows_a, rows_b = a[name], b[name]
        rows = blend_rows(fusion, match.maps[name].T @ rows_a, rows_b, share)
        lines.append(_report_matrix(name, match, rows, rows_a, rows_b))
        fused |= unfold_features({name: rows}, norms, next_)
    of_a = np.float32(share.mean())
    for name in (name for name in side.others if name in next_):
        fused[name] = next_[name] + of_a * (_moved(name, previous, match) - next_[name])
    units = _report_units(side.units_name, match, lines)
    return _FusedSide(fused, [units, *lines], match.maps, share)


def _join_experts(experts: list[_FusedSide]) -> _FusedSide:
    """All experts as one side, of which each is a unit."""
    lines = zip(*(expert.reports for expert in experts), strict=True)
    return _FusedSide(
        stack_expert_blocks([expert.parameters for expert in experts]),
        [merge_reports(f"experts {of_each[0].name}", of_each) for of_each in lines],
        {},
        np.array([expert.share_U.mean() for expert in experts]),
    )


def _report_matrix(
    name: str, match: UnitMatch, fused: np.ndarray, previous: np.ndarray, next_: np.ndarray
) -> MatrixReport:
    if match.coupling is not None:
        return report(name, match.coupling, *map(jnp.asarray, (fused, previous, next_)))
    return report_map(name, sparse.csr_array(match.maps[name]), fused, previous, next_)


def _report_units(name: str, match: UnitMatch, matrices: list[MatrixReport]) -> MatrixReport:
    """A line for what moves as a whole; its norms are the geometric means of its matrices'."""
    ratios = [(line.norm_ratio_previous, line.norm_ratio_next) for line in matrices]
    norm_ratio_previous, norm_ratio_next = np.prod(ratios, axis=0) ** (1 / len(ratios))
    return dataclasses.replace(
        matrices[0],
        name=name,
        effective_sources=1.0 if match.coupling is None else matrices[0].effective_sources,
        norm_ratio_previous=float(norm_ratio_previous),
        norm_ratio_next=float(norm_ratio_next),
        match_gain=match.matched_cost / match.mean_cost if match.mean_cost else 1.0,
        match_order=tuple(match.source_U.tolist()),
    )
