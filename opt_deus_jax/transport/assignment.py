"""Exact optimal permutations: between the rows of two matrices, or by any table of gains."""

from __future__ import annotations

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy import optimize

from opt_deus_jax.transport.plan import Coupling
from opt_deus_jax.transport.sinkhorn import check_rows

_ROWS_AT_ONCE = 1024


def solve_assignment(source_MD: Float[Array, "m d"], target_ND: Float[Array, "n d"]) -> Coupling:
    """Matches each target row with one source row so that the sum of Euclidean distances is least.

    The limit of `solve_sinkhorn` as epsilon goes to 0. Runs (and so equals)
    `scipy.optimize.linear_sum_assignment` on the float64 cost, on the host; inside `jax.jit` as a
    callback.

    Args:
        source_MD: source rows.
        target_ND: target rows, as many as source rows.

    Returns:
        The coupling: the permutation matrix divided by M, in float32; converged, without iterations
        or marginal error, one effective source.

    Raises:
        ValueError: if the shapes do not fit, there are not as many source as target rows, or an
            entry is not finite.
    """
    check_rows(source_MD, target_ND)
    m, n = source_MD.shape[0], target_ND.shape[0]
    if m != n:
        raise ValueError(f"an assignment needs as many source as target rows, got {m} and {n}")
    if isinstance(source_MD, jax.core.Tracer) or isinstance(target_ND, jax.core.Tracer):
        scalar = jax.ShapeDtypeStruct((), np.float32)
        index = jax.ShapeDtypeStruct((m,), np.int32)
        source_of_N, mean_cost, matched_cost = jax.pure_callback(
            _match, (index, scalar, scalar), source_MD, target_ND, vmap_method="sequential"
        )
    else:
        source_of_N, mean_cost, matched_cost = _match(source_MD, target_ND)
    plan_MN = jnp.zeros((m, m), jnp.float32).at[source_of_N, jnp.arange(m)].set(1.0 / m)
    return Coupling(
        plan_MN=plan_MN,
        converged=jnp.bool_(True),
        iterations=jnp.int32(0),
        marginal_error=jnp.float32(0),
        mean_cost=jnp.asarray(mean_cost),
        matched_cost=jnp.asarray(matched_cost),
        effective_sources=jnp.float32(1),
    )


def assign_by_gain(gain_MN: Float[np.ndarray, "m m"]) -> Int[np.ndarray, " m"]:
    """Matches each target with one source so that the sum of gains is greatest.

    Runs (and so equals) `scipy.optimize.linear_sum_assignment` in float64, on the host.

    Args:
        gain_MN: What matching a source (row) with a target (column) is worth.

    Returns:
        For each target its source.

    Raises:
        ValueError: if it is not square or an entry is not finite.
    """
    return assign_by_cost(np.negative(gain_MN, dtype=np.float64, order="C"))


def assign_by_cost(cost_MN: Float[np.ndarray, "m m"]) -> Int[np.ndarray, " m"]:
    """Matches each target with one source so that the sum of costs is least.

    Runs (and so equals) `scipy.optimize.linear_sum_assignment`, on the host. A float64 table in C
    order is not copied: for the neurons of an 8B model it takes 1.6 GB.

    Args:
        cost_MN: What matching a source (row) with a target (column) costs.

    Returns:
        For each target its source, int32.

    Raises:
        ValueError: if it is not square or an entry is not finite.
    """
    if cost_MN.ndim != 2 or cost_MN.shape[0] != cost_MN.shape[1]:
        raise ValueError(f"an assignment needs as many sources as targets, got {cost_MN.shape}")
    # Both are NaN where an entry is.
    if not np.isfinite([cost_MN.min(), cost_MN.max()]).all():
        raise ValueError("an assignment needs finite entries")
    source_M, target_M = optimize.linear_sum_assignment(cost_MN)
    source_of_N = np.empty(len(target_M), np.int32)
    source_of_N[target_M] = source_M
    return source_of_N


def _match(source_MD: jax.Array, target_ND: jax.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each target its source (int32), the mean cost and the mean matched cost (float32)."""
    cost_MN = _host_cost(np.asarray(source_MD, np.float64), np.asarray(target_ND, np.float64))
    source_of_N = assign_by_cost(cost_MN)
    matched = cost_MN[source_of_N, np.arange(len(source_of_N))].mean()
    return source_of_N, np.float32(cost_MN.mean()), np.float32(matched)  # pyright: ignore


def _host_cost(source_MD: np.ndarray, target_ND: np.ndarray) -> np.ndarray:
    """Euclidean distances in float64, where the Gram trick is good to 1e-8 of a row's norm."""
    target_square_N = (target_ND**2).sum(1)
    cost_MN = np.empty((len(source_MD), len(target_ND)))
    # In blocks of rows, or a second table would be made of the products.
    for first in range(0, len(source_MD), _ROWS_AT_ONCE):
        block_RD = source_MD[first : first + _ROWS_AT_ONCE]
        square_RN = (block_RD**2).sum(1)[:, None] + target_square_N[None, :]
        square_RN -= 2.0 * (block_RD @ target_ND.T)
        cost_MN[first : first + _ROWS_AT_ONCE] = np.sqrt(np.maximum(square_RN, 0.0))
    return cost_MN
