"""A transport plan, as a table or as scalings of a kernel, and what is known about it.

Names carry shapes: M source rows, N target rows, D columns.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# `solve_sinkhorn` has four tables of the plan's size at its peak, fusion a fifth. With 8192 rows,
# the width of a 70B model, these are 1.3 GB; with the 14336 neurons of an 8B model they would be
# 4.1 GB, and its two parents are there as well.
LARGEST_PLAN_BYTES = 2**28


class ScaledKernel(NamedTuple):
    """The matrix diag(u) K diag(v), which is applied without being made.

    Attributes:
        source_scaling_M: u.
        kernel_MN: K.
        target_scaling_N: v.
    """

    source_scaling_M: Float[Array, " m"]
    kernel_MN: Float[Array, "m n"]
    target_scaling_N: Float[Array, " n"]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        m, n = self.kernel_MN.shape
        return m, n


Plan = Float[Array, "m n"] | ScaledKernel


class Coupling(NamedTuple):
    """A transport plan between M source and N target rows, and how it came about.

    A pytree of arrays: it may be returned from `jax.jit`.

    Attributes:
        plan_MN: float32, total mass 1, rows sum to 1/M and columns to 1/N; scalings of a kernel
            where it is `wide`.
        converged: whether `marginal_error` is below the threshold that was asked for.
        iterations: Sinkhorn iterations that were run.
        marginal_error: L1 distance to uniform of `plan_MN`'s row sums plus that of its column sums.
        mean_cost: mean over all pairs of rows of their Euclidean distance.
        matched_cost: sum of plan times cost.
        effective_sources: exp of the mean, over targets, of the entropy of the target's column
            normalised to 1. 1 for a permutation, M for the uniform plan.
    """

    plan_MN: Plan
    converged: Bool[Array, ""]
    iterations: Int[Array, ""]
    marginal_error: Float[Array, ""]
    mean_cost: Float[Array, ""]
    matched_cost: Float[Array, ""]
    effective_sources: Float[Array, ""]


def is_wide(sources: int, targets: int) -> bool:
    """Whether a float32 plan between so many rows is above `LARGEST_PLAN_BYTES`."""
    return 4 * sources * targets > LARGEST_PLAN_BYTES


def move_rows(plan_MN: Plan, rows_MD: Float[Array, "m d"]) -> Float[Array, "n d"]:
    """The transpose of a plan or a map times rows; may be called inside `jax.jit`."""
    if isinstance(plan_MN, ScaledKernel):
        u_M, kernel_MN, v_N = plan_MN
        scaled_MD = u_M[:, None] * rows_MD
        return v_N[:, None] * jnp.matmul(kernel_MN.T, scaled_MD, precision="highest")
    return jnp.matmul(plan_MN.T, rows_MD, precision="highest")


def move_columns(kernel_DM: Float[Array, "d m"], plan_MN: Plan) -> Float[Array, "d n"]:
    """A kernel times a plan or a map; may be called inside `jax.jit`."""
    if isinstance(plan_MN, ScaledKernel):
        u_M, kernel_MN, v_N = plan_MN
        return jnp.matmul(kernel_DM * u_M[None, :], kernel_MN, precision="highest") * v_N[None, :]
    return jnp.matmul(kernel_DM, plan_MN, precision="highest")


def strongest_sources(plan_MN: Plan) -> Int[Array, " n"]:
    """For each target the source that it takes most from."""
    if isinstance(plan_MN, ScaledKernel):
        return _strongest(plan_MN.source_scaling_M, plan_MN.kernel_MN)
    return jnp.argmax(plan_MN, axis=0)


def row_sums_of_tiles(
    plan_MN: Plan | Float[np.ndarray, "m n"], starts: Int[np.ndarray, " s"]
) -> Float[np.ndarray, "s n"]:
    """Sums absolute values of the rows from each start to the next, on the host."""
    if not isinstance(plan_MN, ScaledKernel):
        return np.add.reduceat(np.abs(np.asarray(plan_MN)), starts, axis=0)
    u_M, kernel_MN, v_N = map(np.asarray, plan_MN)
    ends = [*starts[1:], len(u_M)]
    tiles = [u_M[i:j] @ kernel_MN[i:j] for i, j in zip(starts, ends, strict=True)]
    return np.stack(tiles) * v_N


@jax.jit
def _strongest(u_M: jax.Array, kernel_MN: jax.Array) -> jax.Array:
    return jnp.argmax(u_M[:, None] * kernel_MN, axis=0)
