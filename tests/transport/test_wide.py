"""solve_wide against solve_sinkhorn, on sizes at which both have room."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opt_deus_jax.transport import diagnostics, plan, sinkhorn, wide

# So that a table of 48 rows is more than one block, and 64 rows are three of another size.
BLOCK = 24


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(wide, "_ROWS_AT_ONCE", BLOCK)


def _weights(rows, columns, sigma, seed):
    generator = np.random.default_rng(seed)
    return jnp.asarray(sigma * generator.standard_normal((rows, columns)), jnp.float32)


def _table(scaled):
    u_M, kernel_MN, v_N = map(np.asarray, scaled)
    return u_M[:, None] * kernel_MN * v_N


def _relative_error(value, expected):
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("rows", "targets", "sigma", "epsilon", "relative"),
    [
        (64, 64, 0.3, 0.01, True),
        (48, 80, 0.3, 0.02, True),
        # Distances near 3.4: exp(-3.4 / 0.03) is far below float32's smallest number.
        (64, 64, 0.3, 0.03, False),
    ],
)
def test_equals_the_solver_that_holds_the_plan(rows, targets, sigma, epsilon, relative):
    source, target = _weights(rows, 64, sigma, 0), _weights(targets, 64, sigma, 1)
    settings = {"epsilon": epsilon, "relative": relative}
    expected = sinkhorn.solve_sinkhorn(source, target, **settings)
    made = wide.solve_wide(source, target, **settings)
    assert made.converged
    assert isinstance(made.plan_MN, plan.ScaledKernel)
    table = _table(made.plan_MN)
    assert _relative_error(table, expected.plan_MN) < 1e-4
    error = np.abs(table.sum(1) - 1 / rows).sum() + np.abs(table.sum(0) - 1 / targets).sum()
    np.testing.assert_allclose(made.marginal_error, error, rtol=0.05, atol=1e-6)
    for fact in ("mean_cost", "matched_cost", "effective_sources"):
        np.testing.assert_allclose(getattr(made, fact), getattr(expected, fact), rtol=1e-4)

    map_MN, dense_MN = sinkhorn.barycentric_map(made), sinkhorn.barycentric_map(expected)
    moved, columns = jax.jit(plan.move_rows), jax.jit(plan.move_columns)
    assert _relative_error(moved(map_MN, source), moved(dense_MN, source)) < 1e-4
    kernel = _weights(16, rows, 1.0, 2)
    assert _relative_error(columns(kernel, map_MN), columns(kernel, dense_MN)) < 1e-4


def test_reports_and_pictures_are_those_of_the_plan():
    source, target = _weights(300, 64, 0.3, 0), _weights(200, 64, 0.3, 1)
    settings = {"epsilon": 0.02, "relative": True}
    made, expected = (
        diagnostics.report("gate", solve(source, target, **settings), target, source, target)
        for solve in (wide.solve_wide, sinkhorn.solve_sinkhorn)
    )
    assert made.match_order == expected.match_order
    for fact in ("effective_sources", "norm_ratio_previous", "norm_ratio_next", "match_gain"):
        assert getattr(made, fact) == pytest.approx(getattr(expected, fact), rel=1e-4)
    coupling = wide.solve_wide(source, target, **settings)
    scaled = diagnostics.picture_of(coupling.plan_MN, made.match_order)
    dense = diagnostics.picture_of(_table(coupling.plan_MN), made.match_order)
    assert scaled.shape == dense.shape == (300, 200)
    assert scaled.mass.shape == (192, 192)
    np.testing.assert_allclose(scaled.mass, dense.mass, rtol=1e-5)
    np.testing.assert_allclose(scaled.mass.sum(), 1.0, rtol=1e-4)


def test_recovers_a_permutation():
    source = _weights(64, 64, 0.3, 0)
    order = np.random.default_rng(1).permutation(64)
    made = wide.solve_wide(source, source[order], epsilon=0.01, relative=True)
    assert made.converged
    np.testing.assert_array_equal(plan.strongest_sources(made.plan_MN), order)
    assert made.matched_cost < 1e-6 * made.mean_cost
    np.testing.assert_allclose(made.effective_sources, 1.0, rtol=1e-4)


def test_a_kernel_that_underflows_is_made_anew_from_the_rows(monkeypatch):
    # One log-domain iteration leaves scalings too large to be trusted where rows differ in size.
    monkeypatch.setattr(wide, "_WARM_ITERATIONS", 1)
    sizes = jnp.exp(_weights(64, 1, 1.5, 2))
    source, target = sizes * _weights(64, 64, 0.3, 0), sizes[::-1] * _weights(64, 64, 0.3, 1)
    costs = []
    cost = wide._blockwise_cost

    def counted(*rows):
        costs.append(rows)
        return cost(*rows)

    monkeypatch.setattr(wide, "_blockwise_cost", counted)
    made = wide.solve_wide(source, target, epsilon=0.01, relative=True)
    expected = sinkhorn.solve_sinkhorn(source, target, epsilon=0.01, relative=True)
    assert len(costs) > 1
    assert made.converged
    assert expected.converged
    assert _relative_error(_table(made.plan_MN), expected.plan_MN) < 1e-3


@pytest.mark.parametrize("max_iterations", [7, 150])
def test_too_few_iterations_are_reported(max_iterations):
    source, target = _weights(64, 64, 0.3, 0), _weights(64, 64, 0.3, 1)
    settings = {"epsilon": 0.003, "relative": True, "max_iterations": max_iterations}
    made = wide.solve_wide(source, target, **settings)
    assert not made.converged
    assert 0 < made.iterations <= max_iterations
    assert made.marginal_error > sinkhorn.DEFAULT_THRESHOLD


def test_rows_that_are_not_finite_do_not_converge():
    source, target = _weights(64, 64, 0.3, 0), _weights(64, 64, 0.3, 1)
    source = source.at[3, 4].set(jnp.nan)
    assert not wide.solve_wide(source, target, epsilon=0.01, relative=True).converged


def test_rows_that_are_all_equal_give_the_uniform_plan():
    zeros = jnp.zeros((64, 64))
    made = wide.solve_wide(zeros, zeros, epsilon=0.01, relative=True)
    assert made.converged
    np.testing.assert_allclose(_table(made.plan_MN), 1 / 64**2, rtol=1e-5)
    np.testing.assert_allclose(made.effective_sources, 64.0, rtol=1e-5)


def test_no_step_of_it_holds_a_second_table():
    rows = 512

    def shaped(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    table, row, width = shaped(rows, rows), shaped(rows), shaped(rows, 8)
    number, index = shaped(), shaped(rows, dtype=jnp.int32)
    scalings = sinkhorn.Scalings(row, row)
    scaled = plan.ScaledKernel(row, table, row)
    # What each takes beside its arguments, in tables; one makes the table.
    steps: Any = (
        (wide._rough_cost, (width, width), 1),
        (wide._find_nearest, (table, width, width), 0),
        (wide._put_nearest, (table, index, row, index, row), 0),
        (wide._into_kernel, (table, row, row, number), 0),
        (wide._log_iterations, (table, row, row, number, number, 10), 0),
        (wide._relaxed, (table, scalings, number, number), 0),
        (wide._errors, (table, row, row), 0),
        (wide._column_facts, (scaled, row, row, number), 0),
        (jax.jit(plan.move_rows), (scaled, width), 0),
        (jax.jit(plan.strongest_sources), (scaled,), 0),
    )
    for step, arguments, tables in steps:
        used = step.lower(*arguments).compile().memory_analysis()
        taken = used.output_size_in_bytes + used.temp_size_in_bytes - used.alias_size_in_bytes
        assert taken < (tables + 0.5) * 4 * rows**2, step
