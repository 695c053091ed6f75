"""Attention heads of one block matched with those of another, as far as functions allow it.

What leaves rotary attention as it is: any order of groups of query heads
with their KV head; any order of query heads in a group; one rotation of each rotary plane of a
group, of its queries and key alike, since scores are Re(q conj(k) e^{i theta (t - s)}); one
orthogonal map of a group's values, undone by its outputs. Where queries and keys are normalised and
scaled, dimension by dimension, only half a turn of a plane passes through: a sign.

Queries could also be scaled against keys, and values against outputs. That is left out, untried: in
five gaps of SmolLM2-135M it would scale queries by 0.92 to 1.27 and values by 0.89 to 1.22.

Names carry shapes: N query heads, K groups, R heads of a group, H head size, F = H / 2 rotary
planes, D columns; a second index of the same kind belongs to parent B.
"""

from typing import NamedTuple

import numpy as np
from scipy import sparse

from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.rope import inverse_frequencies
from opt_deus_jax.transport.assignment import assign_by_gain
from opt_deus_jax.transport.closed_form import nearest_phase, nearest_rotation, nuclear_norm
from opt_deus_jax.upscaling.features import HEAD_MATRICES, Features, UnitMatch
from opt_deus_jax.upscaling.new_block import TransportMap

# Order of heads, phases and rotation are improved in turn; each round can only gain.
_MAX_ROUNDS = 20


class _Overlaps(NamedTuple):
    """Inner products of A's heads with B's, each matrix scaled to norm 1."""

    query_FNN: np.ndarray
    key_FKK: np.ndarray
    value_KKHH: np.ndarray
    output_NNHH: np.ndarray


class _Group(NamedTuple):
    """A group of A laid on a group of B."""

    overlap: float
    head_R: np.ndarray
    phase_F: np.ndarray
    rotation_HH: np.ndarray


def _scale_to_unit(rows: np.ndarray) -> np.ndarray:
    """Divides a matrix by its norm, so that no matrix outweighs another; zeros stay zeros."""
    norm = float(np.linalg.norm(rows))
    return rows / np.float32(norm) if norm else rows


def _plane_dimensions(config: ModelConfig) -> np.ndarray:
    """The two dimensions of a head that make each rotary plane: [2, f].

    Those that are not rotated are paired in the same way: in them, any turn passes.
    """
    sizes = {len(inverse_frequencies(rope, config.head_dim)) for rope in config.ropes}
    if len(sizes) > 1 or config.head_dim % 2:
        raise UserError(
            "config field upscale.transport='symmetric': cannot tell in what planes the heads of "
            "all layers are rotated; use another"
        )
    rotated = 2 * sizes.pop() if sizes else 0
    parts = ((0, rotated), (rotated, config.head_dim))
    return np.concatenate([np.arange(*part).reshape(2, -1) for part in parts], axis=1)


def _planes(rows_ND: np.ndarray, dimensions_2F: np.ndarray) -> np.ndarray:
    """Rows of queries or keys as one complex row for each rotary plane: [f, n, d]."""
    heads_NHD = rows_ND.reshape(-1, dimensions_2F.size, rows_ND.shape[-1])
    first, second = (heads_NHD[:, dimensions] for dimensions in dimensions_2F)
    return np.swapaxes(first + 1j * second, 0, 1)


def _overlaps(a: Features, b: Features, config: ModelConfig) -> _Overlaps:
    head_dim, dimensions_2F = config.head_dim, _plane_dimensions(config)

    def in_planes(name: str) -> np.ndarray:
        first, second = (_planes(rows[name], dimensions_2F) for rows in (a, b))
        overlap = first @ np.conj(np.swapaxes(second, 1, 2))
        # Without an imaginary part the best phase is a sign.
        return overlap if config.facts.query_key_norm == "none" else np.real(overlap) + 0j

    def in_heads(name: str) -> np.ndarray:
        product = (a[name] @ b[name].T).reshape(
            len(a[name]) // head_dim, head_dim, len(b[name]) // head_dim, head_dim
        )
        return np.swapaxes(product, 1, 2)

    return _Overlaps(in_planes("query"), in_planes("key"), in_heads("value"), in_heads("output"))


def _match_group(
    query_FRR: np.ndarray, key_F: np.ndarray, value_HH: np.ndarray, output_RRHH: np.ndarray
) -> _Group:
    heads = len(output_RRHH)
    # Each pair of heads at its own best, with its share of key and value: on a copy the right pairs
    # reach the bound of Cauchy and Schwarz.
    gain_RR = np.zeros((heads, heads))
    if heads > 1:
        gain_RR += np.abs(query_FRR + key_F[:, None, None] / heads).sum(axis=0)
        gain_RR += nuclear_norm(output_RRHH + value_HH / heads)
    best: _Group | None = None
    for _ in range(_MAX_ROUNDS):
        head_R = assign_by_gain(gain_RR)
        pairs = (head_R, np.arange(heads))
        plane_F = key_F + query_FRR[:, *pairs].sum(axis=1)
        rotation, turned = nearest_rotation(value_HH + output_RRHH[pairs].sum(axis=0))
        overlap = float(np.abs(plane_F).sum() + turned)
        if best is not None and overlap <= best.overlap * (1 + 1e-6):
            break
        phase_F = nearest_phase(plane_F)
        best = _Group(overlap, head_R, phase_F, rotation)
        if heads == 1:
            break
        gain_RR = np.einsum("frs,f->rs", query_FRR, phase_F).real
        gain_RR = gain_RR + np.einsum("rshi,ih->rs", output_RRHH, rotation)
    assert best is not None
    return best


def _squares(features: Features, groups: int) -> np.ndarray:
    return sum((rows.reshape(groups, -1) ** 2).sum(axis=1) for rows in features.values())  # pyright: ignore


def match_heads(a: Features, b: Features, config: ModelConfig) -> UnitMatch:
    """Finds the maps of A's heads, out of those that leave A's function alone, nearest to B's.

    Groups are matched exactly by the overlap that their best order of heads, phases and rotation
    reach, which are found in turn from a start that is exact for copies.

    Args:
        a: Features of A by `HEAD_MATRICES`.
        b: Features of B.
        config: The network.

    Returns:
        The match.
    """
    groups = config.num_kv_heads
    heads = config.num_heads // groups
    a, b = ({name: _scale_to_unit(rows[name]) for name in HEAD_MATRICES} for rows in (a, b))
    overlaps = _overlaps(a, b, config)
    pairs: dict[tuple[int, int], _Group] = {}
    gain_KK = np.zeros((groups, groups))
    for i, j in np.ndindex(groups, groups):
        of_i, of_j = (slice(heads * k, heads * (k + 1)) for k in (i, j))
        pairs[i, j] = _match_group(
            overlaps.query_FNN[:, of_i, of_j],
            overlaps.key_FKK[:, i, j],
            overlaps.value_KKHH[i, j],
            overlaps.output_NNHH[of_i, of_j],
        )
        gain_KK[i, j] = pairs[i, j].overlap
    group_K = assign_by_gain(gain_KK)
    matched = [pairs[i, j] for j, i in enumerate(group_K)]
    square_KK = _squares(a, groups)[:, None] + _squares(b, groups)[None] - 2 * gain_KK
    cost_KK = np.sqrt(np.maximum(square_KK, 0))
    return UnitMatch(
        maps=_head_maps(group_K, matched, _plane_dimensions(config)),
        source_U=group_K,
        mean_cost=float(cost_KK.mean()),
        matched_cost=float(cost_KK[group_K, np.arange(groups)].mean()),
    )


def _head_maps(
    group_K: np.ndarray, matched: list[_Group], dimensions_2F: np.ndarray
) -> dict[str, TransportMap]:
    heads = len(matched[0].head_R)
    head_N = np.concatenate(
        [heads * i + group.head_R for i, group in zip(group_K, matched, strict=True)]
    )
    phase_KF = np.stack([group.phase_F for group in matched])
    rotation_KHH = np.stack([group.rotation_HH for group in matched])
    return {
        "query": _plane_map(head_N, np.repeat(phase_KF, heads, axis=0), dimensions_2F),
        "key": _plane_map(group_K, phase_KF, dimensions_2F),
        "value": _block_map(group_K, rotation_KHH),
        "output": _block_map(head_N, np.repeat(rotation_KHH, heads, axis=0)),
    }


def _plane_map(
    head_N: np.ndarray, phase_NF: np.ndarray, dimensions_2F: np.ndarray
) -> sparse.csr_array:
    """Takes heads in an order and turns their planes."""
    turn_NHH = np.zeros((len(head_N), dimensions_2F.size, dimensions_2F.size), np.float32)
    first, second = dimensions_2F
    cos_NF, sin_NF = np.real(phase_NF), np.imag(phase_NF)
    turn_NHH[:, first, first] = cos_NF
    turn_NHH[:, first, second] = -sin_NF
    turn_NHH[:, second, first] = sin_NF
    turn_NHH[:, second, second] = cos_NF
    return _block_map(head_N, turn_NHH)


def _block_map(head_N: np.ndarray, turn_NHH: np.ndarray) -> sparse.csr_array:
    """Takes heads in an order and applies a matrix inside each."""
    target_P, row_P, column_P = np.nonzero(turn_NHH)
    head_dim = turn_NHH.shape[1]
    size = len(head_N) * head_dim
    places = (head_N[target_P] * head_dim + column_P, target_P * head_dim + row_P)
    values_P = turn_NHH[target_P, row_P, column_P].astype(np.float32)
    return sparse.csr_array((values_P, places), shape=(size, size))
