"""Entropic optimal transport between the rows of two matrices, in float32.

Names carry shapes: M source rows, N target rows, D columns.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import acceleration, sinkhorn

from opt_deus_jax.transport.plan import Coupling, Plan, ScaledKernel

# What OpT-DeUS's authors use: absolute, whatever the size of the weights.
REFERENCE_EPSILON = 0.06

# A fraction of the mean cost. Over the upper half of SmolLM2-135M a target neuron then draws on
# 7..90 sources and the moved kernel keeps 0.2..0.6 of its norm. At 0.005 four or five sources are
# left in q, k and gate, which is nearly a hard assignment; at 0.03 a third to four fifths of all
# sources are averaged, and at 0.05 what is left of a kernel is close to its mean row (norm
# 0.06..0.2).
DEFAULT_RELATIVE_EPSILON = 0.01

DEFAULT_THRESHOLD = 5e-6
DEFAULT_MAX_ITERATIONS = 20_000

# Log-domain iterations before the first kernel round, and in place of a rejected one.
_WARM_ITERATIONS = 10
_LOG_ROUND_ITERATIONS = 20
_KERNEL_ROUND_ITERATIONS = 200
# ott measures the error, and may stop, every so many iterations.
_INNER_ITERATIONS = 10
# Within a kernel round ott sets its over-relaxation here, from the contraction seen until then.
MOMENTUM = acceleration.Momentum(start=50)
# A kernel entry that underflows is below 1e-38. Scalings of rows and columns of together at most
# e^40 could raise it to 2e-21, far below float32's resolution of any marginal: nothing is lost.
_MAX_LOG_SCALING = 40.0
# Beyond e^+-88 a scaling itself is not a float32 number.
_MAX_LOG_EXTREME = 80.0
# Keeps 0/0 out of the exponent when all rows are equal and the mean cost is thus 0.
MIN_EPSILON = 1e-20


class _State(NamedTuple):
    """Potentials, the plan they stand for, its marginal error and the iterations spent."""

    f_M: jax.Array
    g_N: jax.Array
    plan_MN: jax.Array
    marginal_error: jax.Array
    iterations: jax.Array


@jax.tree_util.register_pytree_node_class
class _KernelGeometry(geometry.Geometry):
    """An ott geometry whose kernel is stored.

    ott's own raises the kernel to the power epsilon/epsilon(iteration) at every product, in case of
    an epsilon schedule: as dear as the exponentials that scaling mode is there to avoid.
    """

    def apply_kernel(self, vec: jax.Array, eps: float | None = None, axis: int = 0) -> jax.Array:
        del eps  # constant
        kernel_MN = self.kernel_matrix
        if axis == 1:
            return jnp.matmul(kernel_MN, vec, precision="highest")
        return jnp.matmul(vec, kernel_MN, precision="highest")


def check_rows(source_MD: jax.Array, target_ND: jax.Array) -> None:
    """Raises ValueError unless both are matrices, not empty, with the same number of columns."""
    shapes = f"{source_MD.shape} and {target_ND.shape}"
    if source_MD.ndim != 2 or target_ND.ndim != 2 or source_MD.shape[1] != target_ND.shape[1]:
        raise ValueError(f"transport needs two matrices of as many columns, got shapes {shapes}")
    if 0 in source_MD.shape + target_ND.shape:
        raise ValueError(f"transport needs at least one row and one column, got shapes {shapes}")


def check_settings(epsilon: float, threshold: float, max_iterations: int) -> None:
    """Raises ValueError unless the settings of `solve_sinkhorn` are in range."""
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon must be a finite number above 0, got {epsilon}")
    if threshold <= 0 or max_iterations < 1:
        raise ValueError(
            "threshold must be above 0 and max_iterations at least 1, "
            f"got {threshold} and {max_iterations}"
        )


def euclidean_cost(
    source_MD: Float[Array, "m d"], target_ND: Float[Array, "n d"]
) -> Float[Array, "m n"]:
    """Euclidean distance, not squared, of every source row to every target row, in float32.

    By the Gram trick, which costs one matrix product but leaves a distance of about 1e-3 of a row's
    norm between equal rows. Each row's nearest row on the other side is therefore measured again by
    direct difference; with W_B = P W_A the matches come out as 0. Further near-equal rows of the
    same target stay rough, which does no harm: mass moved between equal rows changes no kernel.

    Equals scipy.spatial.distance.cdist to float32 precision.
    """
    check_rows(source_MD, target_ND)
    source_MD = source_MD.astype(jnp.float32)
    target_ND = target_ND.astype(jnp.float32)
    source_square_M = jnp.sum(source_MD**2, axis=1)
    target_square_N = jnp.sum(target_ND**2, axis=1)
    inner_MN = jnp.matmul(source_MD, target_ND.T, precision="highest")
    square_MN = source_square_M[:, None] + target_square_N[None, :] - 2.0 * inner_MN
    cost_MN = jnp.sqrt(jnp.maximum(square_MN, 0.0))

    return put_nearest(cost_MN, *find_nearest(cost_MN, source_MD, target_ND))


def find_nearest(
    cost_MN: jax.Array, source_MD: jax.Array, target_ND: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Each row's nearest on the other side, and its distance by direct difference."""
    source_of_N = jnp.argmin(cost_MN, axis=0)
    target_of_M = jnp.argmin(cost_MN, axis=1)
    exact_N = jnp.linalg.norm(source_MD[source_of_N] - target_ND, axis=1)
    exact_M = jnp.linalg.norm(source_MD - target_ND[target_of_M], axis=1)
    return source_of_N, exact_N, target_of_M, exact_M


def put_nearest(
    cost_MN: jax.Array,
    source_of_N: jax.Array,
    exact_N: jax.Array,
    target_of_M: jax.Array,
    exact_M: jax.Array,
) -> jax.Array:
    """Sets the distances that `find_nearest` gives."""
    cost_MN = cost_MN.at[source_of_N, jnp.arange(len(exact_N))].set(exact_N)
    return cost_MN.at[jnp.arange(len(exact_M)), target_of_M].set(exact_M)


_compiled_cost = jax.jit(euclidean_cost)


def solve_sinkhorn(
    source_MD: Float[Array, "m d"],
    target_ND: Float[Array, "n d"],
    *,
    epsilon: float,
    relative: bool,
    threshold: float = DEFAULT_THRESHOLD,
    max_iterations: int = DEFAULT_MAX_ITERATIONS,
) -> Coupling:
    """Entropic optimal coupling of uniform masses on the rows, under Euclidean distance.

    Minimises <T, C> + epsilon <T, log T> over plans with marginals 1/M and 1/N (Cuturi 2013,
    arXiv 1306.0895). Equals POT's `ot.bregman.sinkhorn_log` in float64 on the same cost.

    Method. A few log-domain iterations of ott's Sinkhorn give potentials f, g. Then rounds: the
    kernel exp((f + g - C) / epsilon), whose entries are all at most about a marginal, is computed
    once, ott iterates on it in scaling mode with adaptive over-relaxation (Lehmann et al. 2021,
    arXiv 2012.12562), and the scalings u, v are absorbed into the potentials (Schmitzer 2019, arXiv
    1610.06519). A round whose scalings are not finite or reach e^40 together, or
    whose kernel has an empty column, could have been harmed by underflow: it is discarded and
    log-domain iterations are run in its place. The plan is u K v, whose float32 marginals are
    several times better than those of a plan computed anew from the potentials.

    May be called inside `jax.jit`.

    Args:
        source_MD: source rows; computed with in float32.
        target_ND: target rows.
        epsilon: strength of the entropy, above 0.
        relative: whether `epsilon` is a fraction of the mean cost; an absolute value otherwise.
        threshold: the marginal error (see `Coupling`) to reach. Float32 reaches about 1e-6 with
            4096 rows; what is not reached is reported as not converged.
        max_iterations: at most so many Sinkhorn iterations.

    Returns:
        The coupling. `converged` is False after too few iterations and on input that is not finite.

    Raises:
        ValueError: if the shapes do not fit, or a setting is out of range.
    """
    check_rows(source_MD, target_ND)
    return solve_sinkhorn_for_cost(
        _compiled_cost(source_MD, target_ND),
        epsilon=epsilon,
        relative=relative,
        threshold=threshold,
        max_iterations=max_iterations,
    )


def solve_sinkhorn_for_cost(
    cost_MN: Float[Array, "m n"],
    *,
    epsilon: float,
    relative: bool,
    threshold: float = DEFAULT_THRESHOLD,
    max_iterations: int = DEFAULT_MAX_ITERATIONS,
) -> Coupling:
    """The same for a table of costs of any kind; see `solve_sinkhorn`.

    Args:
        cost_MN: what it costs to move a source's mass to a target, not negative.
        epsilon: see `solve_sinkhorn`, as are the others.
        relative: whether `epsilon` is a fraction of the mean cost.
        threshold: the marginal error to reach.
        max_iterations: at most so many Sinkhorn iterations.

    Returns:
        The coupling.

    Raises:
        ValueError: if a setting is out of range.
    """
    check_settings(epsilon, threshold, max_iterations)
    return _solve(
        cost_MN,
        jnp.float32(epsilon),
        jnp.float32(threshold),
        relative=relative,
        max_iterations=max_iterations,
    )


def barycentric_map(coupling: Coupling) -> Plan:
    """The plan times N, so that each target receives mass 1; `move_rows` applies it."""
    plan_MN = coupling.plan_MN
    if isinstance(plan_MN, ScaledKernel):
        return plan_MN._replace(target_scaling_N=plan_MN.target_scaling_N * plan_MN.shape[1])
    return plan_MN * plan_MN.shape[1]


def plan_entropy(plan_MN: Float[Array, "m n"]) -> Float[Array, ""]:
    """Mean over the columns of the entropy of a column normalised to 1, in nats."""
    share_MN = plan_MN / jnp.sum(plan_MN, axis=0, keepdims=True)
    return jnp.mean(jnp.sum(jax.scipy.special.entr(share_MN), axis=0))


def plan_marginal_error(plan_MN: Float[Array, "m n"]) -> Float[Array, ""]:
    """L1 distance of the row sums to 1/M plus that of the column sums to 1/N."""
    m, n = plan_MN.shape
    rows = jnp.sum(jnp.abs(jnp.sum(plan_MN, axis=1) - 1.0 / m))
    return rows + jnp.sum(jnp.abs(jnp.sum(plan_MN, axis=0) - 1.0 / n))


@functools.partial(jax.jit, static_argnames=("relative", "max_iterations"))
def _solve(
    cost_MN: jax.Array,
    epsilon: jax.Array,
    threshold: jax.Array,
    *,
    relative: bool,
    max_iterations: int,
) -> Coupling:
    mean_cost = jnp.mean(cost_MN)
    if relative:
        epsilon = jnp.maximum(epsilon * mean_cost, MIN_EPSILON)
    m, n = cost_MN.shape
    warm = min(_WARM_ITERATIONS, max_iterations)
    state = _State(jnp.zeros(m), jnp.zeros(n), jnp.zeros((m, n)), jnp.float32(0), jnp.int32(0))
    state = _log_round(state, cost_MN, epsilon, threshold, warm)

    # Whole blocks of inner iterations, so that max_iterations is never exceeded.
    left = (max_iterations - warm) // _INNER_ITERATIONS * _INNER_ITERATIONS
    length = min(_KERNEL_ROUND_ITERATIONS, left)
    if length:

        def unfinished(state: _State) -> jax.Array:
            # False on NaN too, which nothing can mend.
            room = state.iterations + length <= max_iterations
            return (state.marginal_error >= threshold) & room

        def advance(state: _State) -> _State:
            new, trusted = _kernel_round(state, cost_MN, epsilon, threshold, length)
            log_length = min(_LOG_ROUND_ITERATIONS, length)
            return jax.lax.cond(
                trusted,
                lambda: new,
                lambda: _log_round(state, cost_MN, epsilon, threshold, log_length),
            )

        state = jax.lax.while_loop(unfinished, advance, state)
    return Coupling(
        plan_MN=state.plan_MN,
        converged=state.marginal_error < threshold,
        iterations=state.iterations,
        marginal_error=state.marginal_error,
        mean_cost=mean_cost,
        matched_cost=jnp.sum(state.plan_MN * cost_MN),
        effective_sources=jnp.exp(plan_entropy(state.plan_MN)),
    )


def kernel_of(f_M: jax.Array, g_N: jax.Array, cost_MN: jax.Array, epsilon: jax.Array) -> jax.Array:
    """The plan that potentials stand for."""
    return jnp.exp((f_M[:, None] + g_N[None, :] - cost_MN) / epsilon)


def run_ott(
    geom: geometry.Geometry, init: tuple[jax.Array, jax.Array], iterations: int, **options: Any
) -> tuple[sinkhorn.SinkhornOutput, jax.Array]:
    """Runs ott's solver for at most `iterations`; its output and how many iterations it ran."""
    inner = min(_INNER_ITERATIONS, iterations)
    solver = sinkhorn.Sinkhorn(inner_iterations=inner, max_iterations=iterations, **options)
    # ott broadcasts vectors against matrices, which a caller may have forbidden.
    with jax.numpy_rank_promotion("allow"):
        out = solver(linear_problem.LinearProblem(geom), init=init)
    # ott fills the entries of the blocks that it did not run with -1.
    return out, jnp.sum(out.errors != -1.0, dtype=jnp.int32) * inner


def _log_round(
    state: _State, cost_MN: jax.Array, epsilon: jax.Array, threshold: jax.Array, iterations: int
) -> _State:
    """Continues in the log domain, which can neither underflow nor overflow."""
    geom = geometry.Geometry(cost_MN, epsilon=epsilon)  # pyright: ignore[reportArgumentType]
    out, ran = run_ott(
        geom, (state.f_M, state.g_N), iterations, lse_mode=True, threshold=0.5 * threshold
    )
    plan_MN = kernel_of(out.f, out.g, cost_MN, epsilon)
    error = plan_marginal_error(plan_MN)
    return _State(out.f, out.g, plan_MN, error, state.iterations + ran)


class Scalings(NamedTuple):
    """Logarithms of what rows and columns of a kernel are multiplied by."""

    log_u_M: jax.Array
    log_v_N: jax.Array


def scale_kernel(
    kernel_MN: jax.Array,
    start: Scalings,
    epsilon: jax.Array,
    threshold: jax.Array,
    iterations: int,
    **options: Any,
) -> tuple[Scalings, jax.Array]:
    """Iterates in scaling mode on a kernel; the scalings and how many iterations were run."""
    geom = _KernelGeometry(
        kernel_matrix=kernel_MN,
        epsilon=epsilon,  # pyright: ignore[reportArgumentType]
    )
    # ott sees the error of one marginal only: half the threshold leaves room for the other.
    out, ran = run_ott(
        geom,
        (jnp.exp(start.log_u_M), jnp.exp(start.log_v_N)),
        iterations,
        lse_mode=False,
        threshold=0.5 * threshold,
        **options,
    )
    return Scalings(out.f / epsilon, out.g / epsilon), ran


def are_trusted(kernel_MN: jax.Array, scalings: Scalings) -> jax.Array:
    """Whether nothing that counts can have been lost to underflow."""
    highest = [jnp.max(log) for log in scalings]
    extremes = jnp.stack([jnp.max(jnp.abs(log)) for log in scalings])
    is_small = (highest[0] + highest[1] < _MAX_LOG_SCALING) & jnp.all(extremes < _MAX_LOG_EXTREME)
    # ott leaves the scaling of an empty column at its marginal, which looks harmless.
    return is_small & (jnp.min(jnp.sum(kernel_MN, axis=0)) > 0)


def _kernel_round(
    state: _State, cost_MN: jax.Array, epsilon: jax.Array, threshold: jax.Array, iterations: int
) -> tuple[_State, jax.Array]:
    """Continues in scaling mode on the potentials' kernel; also whether to trust the result."""
    kernel_MN = kernel_of(state.f_M, state.g_N, cost_MN, epsilon)
    start = Scalings(jnp.zeros_like(state.f_M), jnp.zeros_like(state.g_N))
    scalings, ran = scale_kernel(
        kernel_MN, start, epsilon, threshold, iterations, momentum=MOMENTUM
    )
    u_M, v_N = (jnp.exp(log) for log in scalings)
    plan_MN = u_M[:, None] * kernel_MN * v_N[None, :]
    error = plan_marginal_error(plan_MN)
    f_M, g_N = state.f_M + epsilon * scalings.log_u_M, state.g_N + epsilon * scalings.log_v_N
    new = _State(f_M, g_N, plan_MN, error, state.iterations + ran)
    return new, are_trusted(kernel_MN, scalings)
