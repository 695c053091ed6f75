"""Products of float32 activations with bfloat16 kernels, against NumPy in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from opt_deus_jax.models import products
from opt_deus_jax.models.products import project


def _drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


X_MD, KERNEL_OD, COTANGENT_MO = _drawn(0, 96, 64), _drawn(1, 80, 64), _drawn(2, 96, 80)


def _gradients(kernel_dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    kernel = jnp.asarray(KERNEL_OD).astype(kernel_dtype)
    product, pull_back = jax.vjp(project, jnp.asarray(X_MD), kernel)
    return product, *pull_back(jnp.asarray(COTANGENT_MO))


@pytest.mark.parametrize("has_products", [True, False])
def test_only_what_is_multiplied_with_a_kernel_is_rounded(
    monkeypatch: pytest.MonkeyPatch, has_products: bool
):
    monkeypatch.setattr(products, "cpu_has_bfloat16_products", lambda: has_products)
    traced = str(jax.make_jaxpr(lambda: _gradients("bfloat16"))())
    assert ("reduce_precision" in traced) == (not has_products)
    product, x_gradient, kernel_gradient = jax.jit(lambda: _gradients("bfloat16"))()
    assert product.dtype == x_gradient.dtype == jnp.float32
    kernel = _rounded(KERNEL_OD)
    np.testing.assert_allclose(product, _rounded(X_MD) @ kernel.T, rtol=0, atol=2e-5)
    np.testing.assert_allclose(x_gradient, _rounded(COTANGENT_MO) @ kernel, rtol=0, atol=2e-5)
    exact = (COTANGENT_MO.astype(np.float64).T @ X_MD).astype(ml_dtypes.bfloat16)
    assert kernel_gradient.dtype == jnp.bfloat16
    # A sum near the middle of two bfloat16 numbers may go either way.
    np.testing.assert_allclose(
        np.asarray(kernel_gradient, np.float32), exact.astype(np.float32), rtol=2**-7, atol=0
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_operands_of_one_type_keep_it(dtype: str):
    x, kernel = jnp.asarray(X_MD, dtype), jnp.asarray(KERNEL_OD, dtype)
    assert project(x, kernel).dtype == dtype
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
    tolerance = 2e-5 if dtype == "float32" else 0.2
    np.testing.assert_allclose(np.asarray(project(x, kernel), np.float64), exact, atol=tolerance)
