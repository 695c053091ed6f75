"""Products of activations with kernels."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jax.lax import RaggedDotDimensionNumbers
from jaxtyping import Array, Float, Int

# The name of a product with a kernel, as remat policies know it.
PRODUCT = "product"

# Rows, cut into groups, times the kernel of their group: [r, d] x [e, o, d] -> [r, o].
_ROWS = RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
# Back through it: [r, o] x [e, o, d] -> [r, d].
_ROWS_BACK = RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])
# The kernels' gradients, a sum over the rows of each group: [r, o] x [r, d] -> [e, o, d].
_KERNELS = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
# With another number of rows than a multiple of this, XLA for TPU (libtpu 0.0.42) multiplies every
# row with every kernel.
_TPU_ROWS = 8
# Rows, outputs and inputs that the kernel for TPU has on the chip at once.
_TPU_TILE = 512


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """float32 means float32 on every backend; lower types take the hardware's own products."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def multiply(equation: str, left: Array, right: Array, made: jnp.dtype | None = None) -> Array:
    """A product in the lower type of its operands, summed in a type of its own.

    Args:
        equation: As for `jnp.einsum`.
        left: Activations or their gradient.
        right: A kernel of their type, or of a lower one: `left` is then rounded to it. A TPU does
            so with float32 where nothing is asked for.
        made: Type of the sums and of what is returned; None takes that of `left`.

    Returns:
        The product. A CPU without bfloat16 products multiplies the same rounded numbers as float32:
        their products are exact there, so only the order of the sums is another.
    """
    made = jnp.dtype(made or left.dtype)
    in_type = functools.partial(_multiply_in_type, equation, made=made)
    if right.dtype == jnp.bfloat16 and made == jnp.float32 and not cpu_has_bfloat16_products():
        widened = functools.partial(_multiply_widened, equation)
        return jax.lax.platform_dependent(left, right, cpu=widened, default=in_type)
    return in_type(left, right)


def _multiply_in_type(equation: str, left: Array, right: Array, *, made: jnp.dtype) -> Array:
    return jnp.einsum(
        equation,
        left.astype(right.dtype),
        right,
        precision=matmul_precision(right.dtype),
        preferred_element_type=made,
    )


def _multiply_widened(equation: str, left: Array, right: Array) -> Array:
    """The product of both operands rounded to the type of `right`, in float32."""
    info = jnp.finfo(right.dtype)

    def rounded(x: Array) -> Array:
        # A cast there and back is left out by XLA.
        return jax.lax.reduce_precision(x.astype(jnp.float32), info.nexp, info.nmant)

    return jnp.einsum(equation, rounded(left), rounded(right), precision=jax.lax.Precision.HIGHEST)


@functools.cache
def cpu_has_bfloat16_products() -> bool:
    """Whether this machine's CPU multiplies bfloat16 by itself; where Linux does not say so, not.

    XLA emulates them elsewhere, at two thirds of the speed of float32.
    """
    facts = Path("/proc/cpuinfo")
    words = facts.read_text().split() if facts.exists() else []
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)


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


def project_groups(
    x_RD: Float[Array, "r d"], kernel_EOD: Float[Array, "e o d"], size_E: Int[Array, " e"]
) -> Float[Array, "r o"]:
    """Multiplies runs of rows, each with a kernel of its own, in the types of `project`.

    Args:
        x_RD: Activations, those of the first kernel first.
        kernel_EOD: The kernels.
        size_E: How many rows each kernel has; their sum may be less than all rows.

    Returns:
        x W' of each row in the type of the activations, named `PRODUCT` for remat policies. Rows
        beyond the sum of the sizes, here and in the gradient, are whatever the platform leaves.
    """
    rows = len(x_RD)
    if rows % _TPU_ROWS:
        x_RD = jnp.pad(x_RD, ((0, -rows % _TPU_ROWS), (0, 0)))
    return checkpoint_name(_multiply_groups(x_RD, kernel_EOD, size_E)[:rows], PRODUCT)


def _multiply_ragged(
    dimensions: RaggedDotDimensionNumbers, left: Array, right: Array, size_E: Array
) -> Array:
    return jax.lax.ragged_dot_general(
        left.astype(right.dtype),
        right,
        size_E,
        dimensions,
        precision=matmul_precision(right.dtype),
        preferred_element_type=left.dtype,
    )


@jax.custom_vjp
def _multiply_groups(x_RD: Array, kernel_EOD: Array, size_E: Array) -> Array:
    return _multiply_ragged(_ROWS, x_RD, kernel_EOD, size_E)


def _groups_forward(x_RD: Array, kernel_EOD: Array, size_E: Array) -> tuple[Array, tuple]:
    return _multiply_groups(x_RD, kernel_EOD, size_E), (x_RD, kernel_EOD, size_E)


def _groups_backward(residuals: tuple, y_RO: Array) -> tuple[Array, Array, None]:
    x_RD, kernel_EOD, size_E = residuals
    # XLA for TPU would sum over all rows for every kernel here, whatever their number.
    kernel = jax.lax.platform_dependent(
        y_RO, x_RD, size_E, tpu=kernels_by_megablox, default=_kernels_by_ragged
    )
    return (
        _multiply_ragged(_ROWS_BACK, y_RO, kernel_EOD, size_E),
        kernel.astype(kernel_EOD.dtype),
        None,
    )


_multiply_groups.defvjp(_groups_forward, _groups_backward)


def _kernels_by_ragged(y_RO: Array, x_RD: Array, size_E: Array) -> Array:
    return _multiply_ragged(_KERNELS, y_RO, x_RD, size_E)


def kernels_by_megablox(
    y_RO: Float[Array, "r o"],
    x_RD: Float[Array, "r d"],
    size_E: Int[Array, " e"],
    *,
    interpret: bool = False,
) -> Float[Array, "e o d"]:
    """Sums y'x over the rows of each group, by JAX's Pallas kernel for TPU.

    Args:
        y_RO: Gradients of what kernels made.
        x_RD: What the kernels were multiplied with, of the same type.
        size_E: How many rows each kernel has; rows beyond their sum are left out.
        interpret: Whether to run the kernel as JAX operations, on any device.

    Returns:
        The kernels' gradients in that type, summed in float32.
    """
    padding = ((0, -len(x_RD) % _TPU_TILE), (0, 0))
    # The kernel asks for no precision of its own.
    with jax.default_matmul_precision("highest" if x_RD.dtype == jnp.float32 else "default"):
        return tgmm(
            jnp.pad(y_RO, padding).T,
            jnp.pad(x_RD, padding),
            size_E,
            x_RD.dtype,
            (_TPU_TILE,) * 3,
            interpret=interpret,
        )
