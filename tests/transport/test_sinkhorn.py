"""solve_sinkhorn against POT in float64, and its own promises.

Most tests share the shape 64x64, here and in test_diagnostics, so that it is compiled once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from scipy.spatial import distance

from opt_deus_jax.transport import sinkhorn


def _weights(rows: int, columns: int, sigma: float, seed: int) -> jax.Array:
    generator = np.random.default_rng(seed)
    return jnp.asarray(sigma * generator.standard_normal((rows, columns)), jnp.float32)


def _distances(source: jax.Array, target: jax.Array) -> np.ndarray:
    return distance.cdist(np.asarray(source, np.float64), np.asarray(target, np.float64))


def _oracle(source: jax.Array, target: jax.Array, epsilon: float, threshold: float) -> np.ndarray:
    cost = _distances(source, target)
    plan = ot.bregman.sinkhorn_log(
        ot.unif(len(source)), ot.unif(len(target)), cost, epsilon, 20_000, threshold
    )
    return np.asarray(plan)


def _relative_error(value: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))


def _assert_fused_equal(
    coupling: sinkhorn.Coupling, expected: np.ndarray, source: jax.Array, target: jax.Array
) -> None:
    plan = np.asarray(coupling.plan_MN, np.float64)
    rows, targets = np.asarray(source, np.float64), np.asarray(target, np.float64)
    # The rescaled plan is where transport can be seen: unscaled it is 1/rows of the average.
    for scale in (1.0, len(rows)):
        fused = (scale * plan.T @ rows + targets) / 2
        oracle = (scale * expected.T @ rows + targets) / 2
        assert _relative_error(fused, oracle) < 1e-4
    assert _relative_error(plan.T @ rows, expected.T @ rows) < 1e-4
    assert _relative_error(plan, expected) < 1e-4


def test_equals_pot_on_llama_sized_weights():
    source, target = _weights(1024, 2048, 0.02, 0), _weights(1024, 2048, 0.02, 1)
    coupling = sinkhorn.solve_sinkhorn(
        source, target, epsilon=sinkhorn.REFERENCE_EPSILON, relative=False
    )
    assert coupling.converged
    expected = _oracle(source, target, sinkhorn.REFERENCE_EPSILON, 1e-12)
    _assert_fused_equal(coupling, expected, source, target)


@pytest.mark.filterwarnings("ignore::UserWarning:ot")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:ot")
def test_equals_pot_in_the_log_domain_where_plain_pot_returns_zeros():
    # Distances near 10, as SmolLM2's: exp(-10 / 0.06) is far below float32's smallest number.
    source, target = _weights(128, 576, 0.3, 0), _weights(128, 576, 0.3, 1)
    cost = _distances(source, target).astype(np.float32)
    uniform = np.full(128, 1 / 128, np.float32)
    plain = np.asarray(ot.sinkhorn(uniform, uniform, cost, 0.06))
    assert not np.isclose(plain.sum(), 1.0, atol=0.1)

    coupling = sinkhorn.solve_sinkhorn(source, target, epsilon=0.06, relative=False)
    assert coupling.converged
    expected = _oracle(source, target, 0.06, 1e-11)
    _assert_fused_equal(coupling, expected, source, target)


def test_rectangular_plan_equals_pot_and_has_uniform_marginals():
    rows, targets = 48, 80
    source, target = _weights(rows, 32, 0.3, 0), _weights(targets, 32, 0.3, 1)
    coupling = sinkhorn.solve_sinkhorn(source, target, epsilon=0.02, relative=True)
    cost = _distances(source, target)
    expected = _oracle(source, target, 0.02 * cost.mean(), 1e-12)
    plan = np.asarray(coupling.plan_MN)
    assert coupling.converged
    assert _relative_error(plan, expected) < 1e-4
    np.testing.assert_allclose(plan.sum(1), 1 / rows, rtol=1e-3)
    np.testing.assert_allclose(plan.sum(0), 1 / targets, rtol=1e-3)
    np.testing.assert_allclose(
        np.asarray(sinkhorn.barycentric_map(coupling)).sum(0), 1.0, rtol=1e-3
    )
    np.testing.assert_allclose(coupling.mean_cost, cost.mean(), rtol=1e-5)
    np.testing.assert_allclose(coupling.matched_cost, (expected * cost).sum(), rtol=1e-5)
    column = expected / expected.sum(0)
    entropy = -(column * np.log(np.maximum(column, 1e-300))).sum(0).mean()
    np.testing.assert_allclose(coupling.effective_sources, np.exp(entropy), rtol=1e-4)


@pytest.mark.parametrize("sigma", [0.02, 0.3])
def test_recovers_a_permutation(sigma):
    source = _weights(64, 64, sigma, 0)
    order = np.random.default_rng(1).permutation(64)
    target = source[order]
    coupling = sinkhorn.solve_sinkhorn(
        source, target, epsilon=sinkhorn.DEFAULT_RELATIVE_EPSILON, relative=True
    )
    assert coupling.converged
    map_MN = np.asarray(sinkhorn.barycentric_map(coupling))
    np.testing.assert_array_equal(map_MN.argmax(0), order)
    fused = (map_MN.T @ np.asarray(source) + np.asarray(target)) / 2
    assert _relative_error(fused, np.asarray(target)) < 1e-3
    assert coupling.matched_cost < 1e-6 * coupling.mean_cost
    np.testing.assert_allclose(coupling.effective_sources, 1.0, rtol=1e-4)


def test_cost_of_equal_rows_is_zero_and_of_others_is_the_distance():
    source = 1.0 + _weights(64, 576, 0.3, 0)
    target = jnp.concatenate([source[::-1], 1.0 + _weights(16, 576, 0.3, 1)])
    cost = np.asarray(jax.jit(sinkhorn.euclidean_cost)(source, target))
    assert (cost[np.arange(64), 63 - np.arange(64)] == 0).all()
    np.testing.assert_allclose(cost, _distances(source, target), rtol=1e-5)


def test_a_small_epsilon_is_solved_or_reported():
    source, target = _weights(64, 64, 0.3, 0), _weights(64, 64, 0.3, 1)
    coupling = sinkhorn.solve_sinkhorn(source, target, epsilon=1e-4, relative=True)
    plan = np.asarray(coupling.plan_MN, np.float64)
    error = np.abs(plan.sum(1) - 1 / 64).sum() + np.abs(plan.sum(0) - 1 / 64).sum()
    assert np.isfinite(plan).all()
    np.testing.assert_allclose(coupling.marginal_error, error, rtol=0.05, atol=1e-6)
    assert bool(coupling.converged) == (float(coupling.marginal_error) < sinkhorn.DEFAULT_THRESHOLD)


@pytest.mark.parametrize("max_iterations", [7, 37])
def test_too_few_iterations_are_reported(max_iterations):
    source, target = _weights(64, 64, 0.3, 0), _weights(64, 64, 0.3, 1)
    coupling = sinkhorn.solve_sinkhorn(
        source, target, epsilon=0.005, relative=True, max_iterations=max_iterations
    )
    assert not coupling.converged
    assert 0 < coupling.iterations <= max_iterations
    assert coupling.marginal_error > sinkhorn.DEFAULT_THRESHOLD


def test_rows_that_are_not_finite_do_not_converge():
    source, target = _weights(64, 64, 0.3, 0), _weights(64, 64, 0.3, 1)
    source = source.at[3, 4].set(jnp.nan)
    assert not sinkhorn.solve_sinkhorn(source, target, epsilon=0.01, relative=True).converged


def test_rows_that_are_all_equal_give_the_uniform_plan():
    zeros = jnp.zeros((64, 64))
    coupling = sinkhorn.solve_sinkhorn(zeros, zeros, epsilon=0.01, relative=True)
    assert coupling.converged
    np.testing.assert_allclose(coupling.plan_MN, 1 / 64**2, rtol=1e-5)
    np.testing.assert_allclose(coupling.effective_sources, 64.0, rtol=1e-5)


def test_inside_jit_it_gives_the_same_in_float32():
    solve = functools.partial(sinkhorn.solve_sinkhorn, epsilon=0.02, relative=True)
    source, target = _weights(64, 64, 0.3, 0), _weights(64, 64, 0.3, 1)
    eager = solve(source, target)
    jitted = jax.jit(solve)(source, target)
    assert np.asarray(eager.plan_MN).dtype == np.asarray(jitted.plan_MN).dtype == np.float32
    assert eager.iterations.dtype == jnp.int32
    assert eager.converged.dtype == jnp.bool_
    np.testing.assert_allclose(jitted.plan_MN, eager.plan_MN, rtol=1e-4, atol=1e-8)


def test_bfloat16_rows_are_computed_with_in_float32():
    source = _weights(64, 64, 0.3, 0).astype(jnp.bfloat16)
    target = _weights(64, 64, 0.3, 1).astype(jnp.bfloat16)
    cost = jax.jit(sinkhorn.euclidean_cost)(source, target)
    assert cost.dtype == jnp.float32
    expected = _distances(source.astype(jnp.float32), target.astype(jnp.float32))
    np.testing.assert_allclose(cost, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((4, 3), (4, 2)), {}, "as many columns"),
        (((4,), (4, 3)), {}, "two matrices"),
        (((0, 3), (4, 3)), {}, "at least one row"),
        (((4, 3), (4, 3)), {"epsilon": 0.0}, "epsilon must be"),
        (((4, 3), (4, 3)), {"epsilon": float("nan")}, "epsilon must be"),
        (((4, 3), (4, 3)), {"max_iterations": 0}, "max_iterations"),
    ],
)
def test_bad_input_is_refused(shapes, options, message):
    source, target = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        sinkhorn.solve_sinkhorn(source, target, **({"epsilon": 0.1, "relative": True} | options))
