"""Rotations and phases against SciPy, NumPy and a search."""

import numpy as np
import scipy.linalg

from opt_deus_jax.transport.closed_form import nearest_phase, nearest_rotation, nuclear_norm


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_rotation_equals_scipy_one_by_one_and_in_a_batch():
    sources, targets = draw(3, 6, 20), draw(3, 6, 20, seed=1)
    found = nearest_rotation(sources @ np.swapaxes(targets, 1, 2))
    for source, target, rotation, overlap in zip(sources, targets, *found, strict=True):
        # SciPy's R minimises |A R - B| for rows that are points; ours moves columns.
        expected, nuclear = scipy.linalg.orthogonal_procrustes(source.T, target.T)
        np.testing.assert_allclose(rotation, expected.T, atol=1e-12)
        np.testing.assert_allclose(overlap, nuclear)
        np.testing.assert_allclose(((rotation @ source) * target).sum(), overlap)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(6), atol=1e-12)


def test_a_rotated_set_is_turned_back():
    source = draw(5, 12)
    turn, _ = np.linalg.qr(draw(5, 5, seed=2))
    rotation, overlap = nearest_rotation(source @ (turn @ source).T)
    np.testing.assert_allclose(rotation, turn, atol=1e-10)
    np.testing.assert_allclose(overlap, (source**2).sum())


def test_nuclear_norm_equals_numpy():
    matrices = draw(2, 3, 7, 7)
    expected = [[np.linalg.norm(matrix, "nuc") for matrix in row] for row in matrices]
    np.testing.assert_allclose(nuclear_norm(matrices), expected)


def test_phase_is_the_best_of_a_search():
    source = draw(4, 9) + 1j * draw(4, 9, seed=1)
    target = draw(4, 9, seed=2) + 1j * draw(4, 9, seed=3)
    overlap = (source * target.conj()).sum(axis=1)
    phase = nearest_phase(overlap)
    np.testing.assert_allclose(np.abs(phase), 1)
    tried = np.exp(1j * np.linspace(0, 2 * np.pi, 3601))
    distances = np.linalg.norm(tried[:, None, None] * source - target, axis=2)
    found = np.linalg.norm(phase[:, None] * source - target, axis=1)
    assert (found <= distances.min(axis=0)).all()
    np.testing.assert_allclose(found, distances.min(axis=0), rtol=1e-6)


def test_phase_of_nothing_is_one():
    np.testing.assert_array_equal(nearest_phase(np.zeros(3, np.complex64)), np.ones(3))
