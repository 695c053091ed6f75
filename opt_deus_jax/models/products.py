"""Products of activations with kernels."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

# The name of a product with a kernel, as remat policies know it.
PRODUCT = "product"


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """float32 means float32 on every backend; lower types take the hardware's own products."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def multiply(equation: str, left: Array, right: Array) -> Array:
    """A product in the lower type of its operands, in the type of `left`.

    Args:
        equation: As for `jnp.einsum`.
        left: Activations or their gradient.
        right: A kernel of their type, or of a lower one: `left` is then rounded to it, and products
            are summed in the type of `left`. A TPU does so with float32 where nothing is asked for.

    Returns:
        The product.
    """
    return jnp.einsum(
        equation,
        left.astype(right.dtype),
        right,
        precision=matmul_precision(right.dtype),
        preferred_element_type=left.dtype,
    )


def project(x_MD: Float[Array, "m d"], kernel_OD: Float[Array, "o d"]) -> Float[Array, "m o"]:
    """Multiplies activations with a kernel of their type or a lower one.

    With a lower one (`multiply`), the gradient of the activations is such a product too; the
    gradient of the kernel is a product in the type of the activations.

    Args:
        x_MD: Activations.
        kernel_OD: A kernel.

    Returns:
        x W' in the type of the activations, named `PRODUCT` for remat policies.
    """
    product = _multiply_same if x_MD.dtype == kernel_OD.dtype else _multiply_mixed
    return checkpoint_name(product(x_MD, kernel_OD), PRODUCT)


def _multiply_same(x_MD: Array, kernel_OD: Array) -> Array:
    return multiply("md,od->mo", x_MD, kernel_OD)


@jax.custom_vjp
def _multiply_mixed(x_MD: Array, kernel_OD: Array) -> Array:
    return multiply("md,od->mo", x_MD, kernel_OD)


def _forward(x_MD: Array, kernel_OD: Array) -> tuple[Array, tuple[Array, Array]]:
    return multiply("md,od->mo", x_MD, kernel_OD), (x_MD, kernel_OD)


def _backward(residuals: tuple[Array, Array], y_MO: Array) -> tuple[Array, Array]:
    x_MD, kernel_OD = residuals
    # Rounding would not make this one faster: XLA on CPU widens what it sums along first axes.
    kernel = jnp.einsum("mo,md->od", y_MO, x_MD, precision=matmul_precision(x_MD.dtype))
    return multiply("mo,od->md", y_MO, kernel_OD), kernel.astype(kernel_OD.dtype)


_multiply_mixed.defvjp(_forward, _backward)
