"""Factors from a Gram matrix, against NumPy's decomposition of all kernels side by side."""

import numpy as np
import pytest

from opt_deus_jax.errors import UserError
from opt_deus_jax.upscaling.lesa_factors import coordinates_of, factor_kernels, kernel_of


def drawn_kernels(layers, rows, columns, dtype="float32", seed=0):
    draw = np.random.default_rng(seed).standard_normal((layers, rows, columns))
    # Rows of very different size: a hundred thousand lies between the directions.
    return (draw * np.logspace(0, -5, rows)[None, :, None]).astype(dtype)


@pytest.mark.parametrize(("layers", "rows", "columns"), [(5, 12, 8), (3, 16, 16), (3, 24, 4)])
def test_factors_are_those_of_the_whole_up_to_signs(layers, rows, columns):
    kernels = drawn_kernels(layers, rows, columns)
    factors = factor_kernels(kernels.__getitem__, range(layers), "query")
    whole = np.concatenate([*kernels], axis=1).astype(np.float64)
    u, s, v = np.linalg.svd(whole, full_matrices=False)
    assert len(s) == min(rows, layers * columns)
    np.testing.assert_allclose(factors.singular_values_K, s, rtol=1e-5)
    signs = np.sign((factors.basis_OK * u).sum(axis=0))
    np.testing.assert_allclose(factors.basis_OK, u * signs, atol=1e-5)
    ours = np.concatenate([coordinates_of(factors, kernel) for kernel in kernels], axis=1)
    np.testing.assert_allclose(ours, v * signs[:, None], atol=1e-5)
    largest = np.abs(factors.basis_OK).argmax(axis=0)
    assert (factors.basis_OK[largest, np.arange(len(s))] > 0).all()


def test_a_kernel_comes_back_from_its_coordinates():
    kernels = drawn_kernels(4, 12, 8)
    factors = factor_kernels(kernels.__getitem__, range(4), "query")
    for kernel in kernels:
        back = kernel_of(factors, coordinates_of(factors, kernel))
        assert back.dtype == np.float32
        np.testing.assert_allclose(back, kernel, atol=1e-6 * np.abs(kernel).max())


def test_directions_that_no_kernel_has_are_left_out():
    draw = np.random.default_rng(1)
    kernels = draw.standard_normal((4, 10, 3)).astype(np.float32) @ draw.standard_normal((3, 8))
    kernels = np.matmul(draw.standard_normal((10, 2)), kernels[:, :2]).astype(np.float32)
    factors = factor_kernels(kernels.__getitem__, range(4), "query")
    assert factors.singular_values_K.shape == (2,)
    back = kernel_of(factors, coordinates_of(factors, kernels[2]))
    np.testing.assert_allclose(back, kernels[2], atol=1e-5)


def test_bfloat16_is_summed_in_float64():
    kernels = drawn_kernels(5, 12, 8, dtype="bfloat16")
    factors = factor_kernels(kernels.__getitem__, range(5), "query")
    whole = np.concatenate([*kernels], axis=1).astype(np.float64)
    np.testing.assert_allclose(
        factors.singular_values_K, np.linalg.svd(whole, compute_uv=False), rtol=1e-5
    )


def test_kernels_of_zeros_are_refused():
    kernels = np.zeros((3, 4, 4), np.float32)
    with pytest.raises(UserError, match="method='lesa': the output kernels of all layers are zero"):
        factor_kernels(kernels.__getitem__, range(3), "output")
