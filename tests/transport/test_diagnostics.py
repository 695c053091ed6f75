"""The report of one matrix."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse
from scipy.spatial import distance

from opt_deus_jax.transport import assignment, diagnostics, sinkhorn
from opt_deus_jax.transport.plan import move_rows


def _kernel(rows: int, seed: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((rows, 32)), jnp.float32)


def test_report_of_a_permutation():
    previous = _kernel(24, 0)
    order = np.random.default_rng(1).permutation(24)
    following = previous[order]
    coupling = assignment.solve_assignment(previous, following)
    report = diagnostics.report("q", coupling, 0.5 * following, previous, following)
    assert report.name == "q"
    assert report.converged is True
    assert report.iterations == 0
    assert report.match_order == tuple(order)
    assert report.match_gain == pytest.approx(0.0, abs=1e-6)
    assert report.norm_ratio_previous == pytest.approx(0.5)
    assert report.norm_ratio_next == pytest.approx(0.5)


def test_report_of_a_rectangular_plan():
    previous, following = _kernel(48, 0), 2.0 * _kernel(80, 1)
    coupling = sinkhorn.solve_sinkhorn(previous, following, epsilon=0.05, relative=True)
    fused = (move_rows(sinkhorn.barycentric_map(coupling), previous) + following) / 2
    report = diagnostics.report("gate", coupling, fused, previous, following)
    assert report.converged is True
    assert report.iterations > 0
    assert 1 < report.effective_sources < 48
    assert 0 < report.match_gain < 1
    assert report.marginal_error < sinkhorn.DEFAULT_THRESHOLD
    assert len(report.match_order) == 80
    assert report.norm_ratio_next == pytest.approx(
        float(np.linalg.norm(fused) / np.linalg.norm(following)), rel=1e-5
    )


def test_ratios_to_zero():
    zeros, ones = jnp.zeros((64, 64)), jnp.ones((64, 64))
    coupling = sinkhorn.solve_sinkhorn(zeros, zeros, epsilon=0.05, relative=True)
    report = diagnostics.report("k", coupling, ones, zeros, ones)
    assert report.norm_ratio_previous == math.inf
    assert report.norm_ratio_next == pytest.approx(1.0)
    assert report.match_gain == 1.0


def test_report_of_a_signed_permutation():
    previous, following = (np.asarray(_kernel(24, seed)) for seed in (0, 1))
    order = np.random.default_rng(2).permutation(24)
    sign = np.where(np.arange(24) % 2, -1, 1).astype(np.float32)
    map_ = sparse.csr_array((sign, (order, np.arange(24))), shape=(24, 24))
    made = diagnostics.report_map("up", map_, 0.5 * following, previous, following)
    matched = np.linalg.norm(sign[:, None] * previous[order] - following, axis=1).mean()
    mean = distance.cdist(previous, following).mean()
    assert made.match_gain == pytest.approx(matched / mean, rel=1e-5)
    assert made.match_order == tuple(order)
    assert (made.name, made.converged, made.iterations) == ("up", True, 0)
    assert made.effective_sources == 1
    assert made.norm_ratio_next == pytest.approx(0.5)
    again = diagnostics.report_map("up", map_, following, previous, map_.T @ previous)
    assert again.match_gain == 0


def test_report_of_a_rotation_counts_what_it_mixes():
    previous = np.asarray(_kernel(4, 0))
    # Two planes, one turned by an eighth: its rows draw on two sources, the others on one.
    turn = np.eye(4, dtype=np.float32)
    turn[:2, :2] = np.sqrt(np.float32(0.5)) * np.array([[1, 1], [-1, 1]], np.float32)
    made = diagnostics.report_map("key", sparse.csr_array(turn), previous, previous, previous)
    assert made.effective_sources == pytest.approx(2**0.5)
    assert 0 < made.match_gain < 1
