"""Sinkhorn where a plan is so large that only one table of its size may be in memory.

Names carry shapes: M source rows, N target rows, D columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ott.geometry import geometry

from opt_deus_jax.transport.plan import Coupling, ScaledKernel
from opt_deus_jax.transport.sinkhorn import (
    DEFAULT_MAX_ITERATIONS,
    DEFAULT_THRESHOLD,
    MIN_EPSILON,
    MOMENTUM,
    Scalings,
    are_trusted,
    check_rows,
    check_settings,
    find_nearest,
    kernel_of,
    put_nearest,
    run_ott,
    scale_kernel,
)

# Log-domain iterations before the first kernel, and more of them after a kernel that underflowed.
_WARM_ITERATIONS = 10
_MORE_WARM_ITERATIONS = 20
# Over-relaxation is set anew for every round, and keeps an error of about 1e-5 alive until some
# iterations are made without it. In gate and up of four gaps of SmolLM2-135M this takes 120 to 450
# iterations (`solve_sinkhorn`: 210 to 640). Two things do not help there: to start up's potentials
# from gate's (not one round fewer), and to anneal epsilon from 8 times its value (it saves what it
# costs, or less).
_ROUND_ITERATIONS = 100
_PLAIN_ITERATIONS = 10
_ROWS_AT_ONCE = 1024


def solve_wide(
    source_MD: Float[Array, "m d"],
    target_ND: Float[Array, "n d"],
    *,
    epsilon: float,
    relative: bool,
    threshold: float = DEFAULT_THRESHOLD,
    max_iterations: int = DEFAULT_MAX_ITERATIONS,
) -> Coupling:
    """The coupling of `solve_sinkhorn` with one table of its size in memory.

    The rounds are the same, but the kernel of a round takes the place of the cost. The next round,
    if one is needed, computes the cost anew from the rows: one product, worth about a hundred
    iterations. The plan stays what it is, scalings of the last kernel. (With `batch_size`, ott's
    PointCloud needs no table at all, but that product in each half of every iteration.)

    Not for use inside `jax.jit`.

    Args:
        source_MD: See `solve_sinkhorn`, as are the others.
        target_ND: Target rows.
        epsilon: Strength of the entropy.
        relative: Whether `epsilon` is a fraction of the mean cost.
        threshold: The marginal error to reach.
        max_iterations: At most so many Sinkhorn iterations.

    Returns:
        The coupling, its `plan_MN` a `ScaledKernel`.

    Raises:
        ValueError: If the shapes do not fit, or a setting is out of range.
    """
    check_rows(source_MD, target_ND)
    check_settings(epsilon, threshold, max_iterations)
    m, n = len(source_MD), len(target_ND)
    goal = jnp.float32(threshold)
    cost_MN = _blockwise_cost(source_MD, target_ND)
    mean_cost = _mean(cost_MN)
    scale = jnp.maximum(epsilon * mean_cost if relative else jnp.float32(epsilon), MIN_EPSILON)
    potentials = jnp.zeros(m), jnp.zeros(n)
    warm_up = functools.partial(_warm_up, epsilon=scale, threshold=goal)
    potentials, spent = warm_up(cost_MN, potentials, min(_WARM_ITERATIONS, max_iterations))
    while True:
        kernel_MN = _into_kernel(cost_MN, *potentials, scale)
        del cost_MN
        scalings, error, is_trusted, ran = _rounds(kernel_MN, scale, goal, max_iterations - spent)
        spent += ran
        if is_trusted or spent + _ROUND_ITERATIONS > max_iterations:
            break
        del kernel_MN
        cost_MN = _blockwise_cost(source_MD, target_ND)
        moved = (f + scale * log for f, log in zip(potentials, scalings, strict=True))
        potentials, ran = warm_up(cost_MN, tuple(moved), _MORE_WARM_ITERATIONS)
        spent += ran
    plan = ScaledKernel(jnp.exp(scalings.log_u_M), kernel_MN, jnp.exp(scalings.log_v_N))
    facts = mean_cost, *_plan_facts(plan, potentials, scale)
    converged = jnp.bool_(is_trusted and error < threshold)
    return Coupling(plan, converged, jnp.int32(spent), jnp.float32(error), *facts)


def _mean(cost_MN: jax.Array) -> jax.Array:
    # One long sum of 1e8 numbers in float32 would be wrong in the first digits.
    n = cost_MN.shape[1]
    return jnp.mean(jnp.matmul(cost_MN, jnp.full(n, 1 / n), precision="highest"))


def _block_rows(rows: int) -> int:
    """Rows of a block: the largest divisor of all rows up to `_ROWS_AT_ONCE`."""
    return next(size for size in range(min(rows, _ROWS_AT_ONCE), 0, -1) if rows % size == 0)


def _over_blocks(
    rows: int, body: Callable[[Callable[[jax.Array], jax.Array], Any, Any], Any], start: Any
) -> Any:
    """Runs `body(cut, first, carry)` over blocks of rows, one after the other.

    Blocks that do not wait for each other would all be in memory at once.
    """
    size = _block_rows(rows)

    def step(i: jax.Array, carry: Any) -> Any:
        first = i * size
        return body(lambda x: jax.lax.dynamic_slice_in_dim(x, first, size), first, carry)

    return jax.lax.fori_loop(0, rows // size, step, start)


def _blockwise_cost(source_MD: jax.Array, target_ND: jax.Array) -> jax.Array:
    """`euclidean_cost`, which holds a second table for the products, in blocks of rows."""
    source_MD, target_ND = source_MD.astype(jnp.float32), target_ND.astype(jnp.float32)
    rough_MN = _rough_cost(source_MD, target_ND)
    return _put_nearest(rough_MN, *_find_nearest(rough_MN, source_MD, target_ND))


_find_nearest = jax.jit(find_nearest)
# Found and put in one program, XLA would put them into a copy.
_put_nearest = jax.jit(put_nearest, donate_argnums=0)


@jax.jit
def _rough_cost(source_MD: jax.Array, target_ND: jax.Array) -> jax.Array:
    target_square_N = jnp.sum(target_ND**2, axis=1)

    def fill(cut, first, cost_MN):
        block_RD = cut(source_MD)
        square_RN = jnp.sum(block_RD**2, axis=1)[:, None] + target_square_N[None, :]
        square_RN -= 2.0 * jnp.matmul(block_RD, target_ND.T, precision="highest")
        block_RN = jnp.sqrt(jnp.maximum(square_RN, 0.0))
        return jax.lax.dynamic_update_slice_in_dim(cost_MN, block_RN, first, axis=0)

    empty_MN = jnp.zeros((len(source_MD), len(target_ND)), jnp.float32)
    return _over_blocks(len(source_MD), fill, empty_MN)


@functools.partial(jax.jit, donate_argnums=0)
def _into_kernel(
    cost_MN: jax.Array, f_M: jax.Array, g_N: jax.Array, epsilon: jax.Array
) -> jax.Array:
    """The potentials' kernel, in the memory of the cost."""
    return kernel_of(f_M, g_N, cost_MN, epsilon)


@jax.tree_util.register_pytree_node_class
class _BlockwiseGeometry(geometry.Geometry):
    """An ott geometry whose log-sum-exps need no second table."""

    def _softmax(self, f, g, eps, vec, axis):  # noqa: ANN001, ANN202
        if vec is not None:
            raise NotImplementedError("only potentials are updated")
        cost_MN = self.cost_matrix

        def exponents(cut):
            return (cut(f)[:, None] + g[None, :] - cut(cost_MN)) / eps

        def of_rows(cut, first, total_M):
            block_R = jax.nn.logsumexp(exponents(cut), axis=1)
            return jax.lax.dynamic_update_slice_in_dim(total_M, block_R, first, axis=0)

        def of_columns(cut, _, total_N):
            return jnp.logaddexp(total_N, jax.nn.logsumexp(exponents(cut), axis=0))

        body, start = ((of_columns, g), (of_rows, f))[axis]
        return eps * _over_blocks(len(f), body, jnp.full_like(start, -jnp.inf)), jnp.ones(1)


@functools.partial(jax.jit, static_argnums=5)
def _log_iterations(
    cost_MN: jax.Array,
    f_M: jax.Array,
    g_N: jax.Array,
    epsilon: jax.Array,
    threshold: jax.Array,
    iterations: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    geom = _BlockwiseGeometry(cost_MN, epsilon=epsilon)  # pyright: ignore[reportArgumentType]
    out, ran = run_ott(geom, (f_M, g_N), iterations, lse_mode=True, threshold=0.5 * threshold)
    return out.f, out.g, ran


def _warm_up(
    cost_MN: jax.Array,
    potentials: tuple[jax.Array, jax.Array],
    iterations: int,
    *,
    epsilon: jax.Array,
    threshold: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], int]:
    """Iterates in the log domain; the potentials and how many iterations were run."""
    f_M, g_N, ran = _log_iterations(cost_MN, *potentials, epsilon, threshold, iterations)
    return (f_M, g_N), int(ran)


def _rounds(
    kernel_MN: jax.Array, epsilon: jax.Array, threshold: jax.Array, max_iterations: int
) -> tuple[Scalings, float, bool, int]:
    """As many rounds on a kernel as it takes or as it is trusted in; returns what `_round` does."""
    m, n = kernel_MN.shape
    scalings, is_trusted, spent = Scalings(jnp.zeros(m), jnp.zeros(n)), True, 0
    error = _marginal_error(kernel_MN, scalings)
    # False on NaN too, which nothing can mend.
    while error >= threshold and is_trusted and spent + _ROUND_ITERATIONS <= max_iterations:
        made, error, is_trusted, ran = _round(kernel_MN, scalings, epsilon, threshold)
        spent += ran
        scalings = made if is_trusted else scalings
    return scalings, error, is_trusted, spent


def _round(
    kernel_MN: jax.Array, start: Scalings, epsilon: jax.Array, threshold: jax.Array
) -> tuple[Scalings, float, bool, int]:
    """Iterates on a kernel: the scalings, their error, whether to trust them, iterations run."""
    scalings, ran = _relaxed(kernel_MN, start, epsilon, threshold)
    is_trusted = bool(_are_trusted(kernel_MN, scalings))
    return scalings, _marginal_error(kernel_MN, scalings), is_trusted, int(ran)


@jax.jit
def _relaxed(
    kernel_MN: jax.Array, start: Scalings, epsilon: jax.Array, threshold: jax.Array
) -> tuple[Scalings, jax.Array]:
    relaxed, ran = scale_kernel(
        kernel_MN,
        start,
        epsilon,
        threshold,
        _ROUND_ITERATIONS - _PLAIN_ITERATIONS,
        momentum=MOMENTUM,
    )
    plain, ran_plain = scale_kernel(kernel_MN, relaxed, epsilon, threshold, _PLAIN_ITERATIONS)
    return plain, ran + ran_plain


_are_trusted = jax.jit(are_trusted)


def _marginal_error(kernel_MN: jax.Array, scalings: Scalings) -> float:
    """`plan_marginal_error` of the plan that the scalings make."""
    return float(_errors(kernel_MN, *(jnp.exp(log) for log in scalings)))


@jax.jit
def _errors(kernel_MN: jax.Array, u_M: jax.Array, v_N: jax.Array) -> jax.Array:
    m, n = kernel_MN.shape
    of_rows = u_M * jnp.matmul(kernel_MN, v_N, precision="highest")
    of_columns = v_N * jnp.matmul(u_M, kernel_MN, precision="highest")
    return jnp.sum(jnp.abs(of_rows - 1 / m)) + jnp.sum(jnp.abs(of_columns - 1 / n))


def _plan_facts(
    plan: ScaledKernel, potentials: tuple[jax.Array, jax.Array], epsilon: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The matched cost and the effective sources of a coupling."""
    cost_N, entropy_N = map(np.asarray, _column_facts(plan, *potentials, epsilon))
    matched_cost = jnp.float32(cost_N.sum(dtype=np.float64))
    return matched_cost, jnp.float32(np.exp(entropy_N.mean(dtype=np.float64)))


@jax.jit
def _column_facts(
    plan: ScaledKernel, f_M: jax.Array, g_N: jax.Array, epsilon: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """For each target its part of the matched cost, and the entropy of its sources.

    The kernel's logarithm gives the cost back, but where it underflowed and nothing was moved.
    """
    u_M, kernel_MN, v_N = plan
    tiny = jnp.finfo(jnp.float32).tiny

    def add(cut, _, sums):
        u_R, kernel_RN = cut(u_M)[:, None], cut(kernel_MN)
        log_RN = jnp.log(jnp.maximum(kernel_RN, tiny))
        cost_RN = jnp.maximum(cut(f_M)[:, None] + g_N[None, :] - epsilon * log_RN, 0)
        mass_RN = u_R * kernel_RN
        terms = (mass_RN, mass_RN * cost_RN, mass_RN * (jnp.log(u_R) + log_RN))
        return tuple(total + jnp.sum(x, axis=0) for total, x in zip(sums, terms, strict=True))

    zeros_N = jnp.zeros_like(v_N)
    mass_N, cost_N, logs_N = _over_blocks(len(u_M), add, (zeros_N, zeros_N, zeros_N))
    return v_N * cost_N, jnp.log(mass_N) - logs_N / mass_N
