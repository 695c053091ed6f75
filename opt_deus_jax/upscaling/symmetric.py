"""Fusion after an alignment that leaves the function of block A exactly as it is.

A's heads and neurons are laid on B's by symmetries of the network only. Nothing moves on the
residual stream, whose basis adjacent layers share.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.transport.diagnostics import MatrixReport, report_map
from opt_deus_jax.upscaling.blending import blend_features, shares_of_previous
from opt_deus_jax.upscaling.features import (
    HEAD_MATRICES,
    NEURON_MATRICES,
    NORMS,
    check_parameters,
    fold_features,
    unfold_features,
)
from opt_deus_jax.upscaling.heads import HeadMatch, head_maps, match_heads
from opt_deus_jax.upscaling.neurons import NeuronMatch, match_neurons, neuron_maps
from opt_deus_jax.upscaling.new_block import Block, Fused

Maps = dict[str, sparse.csr_array]
_FIELD = "config field upscale.transport='symmetric'"
_OUTPUT_BIAS = {"heads": "output_bias", "neurons": "down_bias"}


class _Side(NamedTuple):
    """Attention or the MLP: what its units are and how they are matched."""

    units_name: str
    units: int
    matrices: tuple[str, ...]
    match: Callable[[Any, Any], tuple[HeadMatch | NeuronMatch, Maps, np.ndarray]]


def _sides(config: ModelConfig) -> tuple[_Side, _Side]:
    def heads(a, b):
        found = match_heads(a, b, config)
        return found, head_maps(found), found.group_K

    def neurons(a, b):
        found = match_neurons(a, b)
        return found, neuron_maps(found), found.source_M

    return (
        _Side("heads", config.num_kv_heads, HEAD_MATRICES, heads),
        _Side("neurons", config.mlp_width, NEURON_MATRICES, neurons),
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
    check_parameters(previous, _FIELD)
    aligned = dict(previous)
    for side in _sides(config):
        a, b = (fold_features(block, side.matrices) for block in (previous, next_))
        _, maps, _ = side.match(a, b)
        moved = {name: maps[name].T @ rows for name, rows in a.items()}
        aligned |= unfold_features(moved, previous, previous)
    return aligned


def _fused_norms(previous: Block, next_: Block) -> dict[str, np.ndarray]:
    """Root mean squares with B's sign, which no kernel is enlarged by being divided by."""
    return {
        name: np.copysign(np.sqrt((previous[name] ** 2 + next_[name] ** 2) / 2), next_[name])
        for name in NORMS
    }


def fuse_symmetric(previous: Block, next_: Block, *, config: ModelConfig, fusion: str) -> Fused:
    """Aligns A to B by symmetries of the network and fuses the two, feature by feature.

    Args:
        previous: Parent A, float32 arrays by the names of `block_specs`.
        next_: Parent B, likewise.
        config: The network.
        fusion: A name of `blending.FUSIONS`.

    Returns:
        The new block, its outputs not zeroed; a report for each matrix, for heads (in groups with
        their KV head) and for neurons; the maps.

    Raises:
        UserError: The block has parameters whose symmetries are not known here.
    """
    check_parameters(previous, _FIELD)
    norms = _fused_norms(previous, next_)
    fused: dict[str, np.ndarray] = {}
    reports: list[MatrixReport] = []
    maps: Maps = {}
    for side in _sides(config):
        a, b = (fold_features(block, side.matrices) for block in (previous, next_))
        found, side_maps, unit_of = side.match(a, b)
        moved = {name: side_maps[name].T @ rows for name, rows in a.items()}
        share = shares_of_previous(fusion, moved, b, side.units)
        blended = blend_features(fusion, moved, b, share)
        reports.append(_report_units(side.units_name, found, unit_of, blended, a, b))
        reports += [
            report_map(name, side_maps[name], blended[name], a[name], b[name]) for name in a
        ]
        maps |= side_maps
        fused |= unfold_features(blended, norms, next_)
        bias = _OUTPUT_BIAS[side.units_name]
        if bias in next_:
            of_a = np.float32(share.mean())
            fused[bias] = of_a * previous[bias] + (1 - of_a) * next_[bias]
    return Fused({name: fused[name] for name in next_}, tuple(reports), maps)


def _report_units(
    name: str,
    match: HeadMatch | NeuronMatch,
    unit_of: np.ndarray,
    fused: Mapping[str, np.ndarray],
    previous: Mapping[str, np.ndarray],
    next_: Mapping[str, np.ndarray],
) -> MatrixReport:
    """One line for what moves as a whole."""
    norm, norm_a, norm_b = (
        float(np.sqrt(sum(float((rows**2).sum()) for rows in features.values())))
        for features in (fused, previous, next_)
    )
    return MatrixReport(
        name=name,
        converged=True,
        iterations=0,
        marginal_error=0.0,
        effective_sources=1.0,
        norm_ratio_previous=norm / norm_a,
        norm_ratio_next=norm / norm_b,
        match_gain=match.matched_cost / match.mean_cost if match.mean_cost else 1.0,
        match_order=tuple(unit_of.tolist()),
    )
