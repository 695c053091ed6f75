"""What a transport did to one matrix, in plain Python numbers."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import sparse, special

from opt_deus_jax.transport.plan import Coupling, Plan, row_sums_of_tiles, strongest_sources

_ROWS_AT_ONCE = 1024
_PICTURE_SIZE = 192


class MapPicture(NamedTuple):
    """A map as it is drawn: small, whatever the size of the map.

    Attributes:
        mass: sums of the map's absolute entries in at most 192 x 192 tiles, so that thin entries
            do not vanish; targets sorted by their strongest source.
        shape: of the map.
    """

    mass: Float[np.ndarray, "s t"]
    shape: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class MatrixReport:
    """The report of one fused matrix.

    Attributes:
        name: name of the matrix.
        converged: see `Coupling`, as are the next three.
        iterations: Sinkhorn iterations; 0 for an assignment.
        marginal_error: L1 error of both marginals.
        effective_sources: how many sources a target draws on; 1 for a permutation, M for a
            uniform plan.
        norm_ratio_previous: Frobenius norm of the fused kernel over that of the previous layer's.
        norm_ratio_next: the same over the next layer's.
        match_gain: matched over mean cost; 1 where the plan is no better than chance, 0 where
            every row has found its equal.
        match_order: for each target its strongest source; sorts a heat map of the plan.
    """

    name: str
    converged: bool
    iterations: int
    marginal_error: float
    effective_sources: float
    norm_ratio_previous: float
    norm_ratio_next: float
    match_gain: float
    match_order: tuple[int, ...]


def report_from_json(fields: Mapping[str, Any]) -> MatrixReport:
    """The report of which `dataclasses.asdict` was written as JSON."""
    return MatrixReport(**{**fields, "match_order": tuple(fields["match_order"])})


def picture_to_json(picture: MapPicture) -> dict[str, Any]:
    """A picture as JSON, every bit kept."""
    mass = np.ascontiguousarray(picture.mass, np.float32)
    encoded = base64.b64encode(mass.tobytes()).decode()
    return {"mass": encoded, "tiles": mass.shape, "shape": picture.shape}


def picture_from_json(fields: Mapping[str, Any]) -> MapPicture:
    """Undoes `picture_to_json`."""
    mass = np.frombuffer(base64.b64decode(fields["mass"]), np.float32)
    return MapPicture(mass.reshape(fields["tiles"]), tuple(fields["shape"]))


def report(
    name: str,
    coupling: Coupling,
    fused: Float[Array, "n d"],
    previous: Float[Array, "m d"],
    next: Float[Array, "n d"],
) -> MatrixReport:
    """Sums up a coupling of `previous` with `next` and the kernel `fused` from them.

    A ratio of 0 to 0 counts as 1, of anything else to 0 as infinite. Not for use inside `jax.jit`.
    """
    norms = jnp.stack([_norm(kernel) for kernel in (fused, previous, next)])
    match_order = strongest_sources(coupling.plan_MN)
    host, norms, match_order = jax.device_get(
        (coupling._replace(plan_MN=jnp.zeros(0)), norms, match_order)
    )
    norm_fused, norm_previous, norm_next = (float(norm) for norm in norms)
    return MatrixReport(
        name=name,
        converged=bool(host.converged),
        iterations=int(host.iterations),
        marginal_error=float(host.marginal_error),
        effective_sources=float(host.effective_sources),
        norm_ratio_previous=_ratio(norm_fused, norm_previous),
        norm_ratio_next=_ratio(norm_fused, norm_next),
        match_gain=_ratio(float(host.matched_cost), float(host.mean_cost)),
        match_order=tuple(match_order.tolist()),
    )


def report_map(
    name: str,
    map_MN: sparse.csr_array,
    fused: Float[np.ndarray, "n d"],
    previous: Float[np.ndarray, "m d"],
    next: Float[np.ndarray, "n d"],
) -> MatrixReport:
    """Sums up an exact map whose columns have norm 1: a signed permutation, or a rotation.

    The cost is the distance of rows of B from A's moved by the map, over the mean distance of A's
    own. Each target draws on a source by the square of the map's entry. See `report` for the rest.
    """
    moved = map_MN.T @ previous
    matched = np.linalg.norm(moved - next, axis=1).mean(dtype=np.float64)
    share = map_MN.multiply(map_MN).tocoo()
    entropy = float(special.entr(share.data).sum(dtype=np.float64)) / len(next)
    norm_fused, norm_previous, norm_next = (
        float(np.linalg.norm(rows)) for rows in (fused, previous, next)
    )
    return MatrixReport(
        name=name,
        converged=True,
        iterations=0,
        marginal_error=0.0,
        effective_sources=math.exp(entropy),
        norm_ratio_previous=_ratio(norm_fused, norm_previous),
        norm_ratio_next=_ratio(norm_fused, norm_next),
        match_gain=_ratio(float(matched), _mean_distance(previous, next)),
        match_order=tuple(np.asarray(abs(map_MN).argmax(axis=0)).ravel().tolist()),
    )


def picture_of(
    map_MN: Plan | np.ndarray | sparse.csr_array, match_order: tuple[int, ...]
) -> MapPicture:
    """Sums up a map for a heat map.

    Args:
        map_MN: a plan, or a map that was applied.
        match_order: `MatrixReport.match_order`.

    Returns:
        The picture.
    """
    m, n = (int(size) for size in map_MN.shape)  # pyright: ignore[reportOptionalIterable]
    starts_S, starts_T = (
        np.linspace(0, size, min(size, _PICTURE_SIZE), endpoint=False).astype(int)
        for size in (m, n)
    )
    if isinstance(map_MN, sparse.csr_array):
        tile_M = np.searchsorted(starts_S, np.arange(m), side="right") - 1
        in_tile_SM = sparse.csr_array((np.ones(m, np.float32), (tile_M, np.arange(m))))
        rows_SN = (in_tile_SM @ abs(map_MN)).toarray()
    else:
        # A soft symmetric map has signs.
        rows_SN = row_sums_of_tiles(
            abs(map_MN) if isinstance(map_MN, np.ndarray) else map_MN, starts_S
        )
    sorted_SN = rows_SN[:, np.argsort(np.asarray(match_order), kind="stable")]
    return MapPicture(np.add.reduceat(sorted_SN, starts_T, axis=1), (m, n))


def _mean_distance(previous: np.ndarray, next: np.ndarray) -> float:
    """Mean Euclidean distance of all pairs of rows, without the table of all pairs."""
    square_M, square_N = ((rows**2).sum(axis=1) for rows in (previous, next))
    total = 0.0
    for first in range(0, len(previous), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        square = square_M[part, None] + square_N[None] - 2 * previous[part] @ next.T
        total += float(np.sqrt(np.maximum(square, 0)).sum(dtype=np.float64))
    return total / (len(previous) * len(next))


def _norm(kernel: jax.Array) -> jax.Array:
    return jnp.linalg.norm(kernel.astype(jnp.float32))


def _ratio(numerator: float, denominator: float) -> float:
    if denominator:
        return numerator / denominator
    return math.inf if numerator else 1.0
