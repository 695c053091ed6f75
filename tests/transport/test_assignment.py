"""solve_assignment against SciPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize
from scipy.spatial import distance

from opt_deus_jax.transport import assignment, sinkhorn


def _weights(rows: int, columns: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (0.3 * generator.standard_normal((rows, columns))).astype(np.float32)


@pytest.mark.parametrize("jit", [False, True])
def test_equals_scipy(jit):
    source, target = jnp.asarray(_weights(160, 24, 0)), jnp.asarray(_weights(160, 24, 1))
    solve = jax.jit(assignment.solve_assignment) if jit else assignment.solve_assignment
    coupling = solve(source, target)
    cost = distance.cdist(np.asarray(source, np.float64), np.asarray(target, np.float64))
    rows, columns = optimize.linear_sum_assignment(cost)

    expected = np.zeros((160, 160), np.float32)
    expected[rows, columns] = 1 / 160
    np.testing.assert_array_equal(coupling.plan_MN, expected)
    assert np.asarray(coupling.plan_MN).dtype == np.float32
    assert coupling.converged
    assert coupling.iterations == 0
    assert coupling.marginal_error == 0
    assert coupling.effective_sources == 1
    np.testing.assert_allclose(coupling.matched_cost, cost[rows, columns].mean(), rtol=1e-6)
    np.testing.assert_allclose(coupling.mean_cost, cost.mean(), rtol=1e-6)


def test_recovers_a_permutation():
    source = _weights(96, 64, 0)
    order = np.random.default_rng(1).permutation(96)
    coupling = assignment.solve_assignment(jnp.asarray(source), jnp.asarray(source[order]))
    map_MN = np.asarray(sinkhorn.barycentric_map(coupling))
    np.testing.assert_array_equal(map_MN.argmax(0), order)
    np.testing.assert_allclose((map_MN.T @ source + source[order]) / 2, source[order], atol=1e-6)


def test_another_number_of_rows_is_refused():
    with pytest.raises(ValueError, match="as many source as target rows, got 4 and 5"):
        assignment.solve_assignment(jnp.zeros((4, 3)), jnp.zeros((5, 3)))


def test_rows_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        assignment.solve_assignment(jnp.full((4, 3), jnp.nan), jnp.zeros((4, 3)))


def test_assignment_by_gain_is_the_best_of_all_orders():
    gain = _weights(6, 6, 3)
    best = max(itertools.permutations(range(6)), key=lambda order: gain[order, range(6)].sum())
    np.testing.assert_array_equal(assignment.assign_by_gain(gain), best)


@pytest.mark.parametrize(
    ("gain", "message"),
    [
        (np.zeros((2, 3)), r"as many sources as targets, got \(2, 3\)"),
        (np.full((2, 2), np.nan), "finite"),
    ],
)
def test_gains_that_cannot_be_assigned_are_refused(gain, message):
    with pytest.raises(ValueError, match=message):
        assignment.assign_by_gain(gain)
