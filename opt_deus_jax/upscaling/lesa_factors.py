"""The coordinates in which LESA predicts: singular vectors that all layers have in common."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from opt_deus_jax.errors import UserError

# Below this share of the strongest direction a Gram matrix in float64 knows fewer than four digits.
_WEAKEST = 1e-6


class Factors(NamedTuple):
    """The left half of a thin SVD of the kernels of all layers, side by side.

    Attributes:
        basis_OK: U, float64; the largest entry of each column is positive.
        singular_values_K: S, float64, the largest first.
    """

    basis_OK: Float[np.ndarray, "o k"]
    singular_values_K: Float[np.ndarray, " k"]


def factor_kernels(
    read: Callable[[int], Float[np.ndarray, "o i"]], layers: Sequence[int], name: str
) -> Factors:
    """Decomposes [W_0, W_1, ...] = U S V' with one kernel and a Gram matrix in memory.

    U and S^2 are the eigenvectors and eigenvalues of the sum of all W W', which has the size of one
    layer's rows. Squaring halves the digits, so it is done in float64. Directions below 1e-6 of the
    strongest are left out: no kernel has a part in them, and V' would be 0 / 0 there.

    Args:
        read: Gives the kernel [out, in] of a layer.
        layers: Which layers.
        name: Of the matrix, for the error message.

    Returns:
        The factors that equal `numpy.linalg.svd(np.concatenate(kernels, axis=1))` up to signs.

    Raises:
        UserError: The kernels are zero throughout.

    Source: Yang et al. 2025 (LESA, arXiv 2502.13794), who decompose the whole in memory.
    """
    gram_OO: np.ndarray | float = 0.0
    columns = 0
    for layer in layers:
        kernel_OI = read(layer).astype(np.float64)
        gram_OO += kernel_OI @ kernel_OI.T
        columns += kernel_OI.shape[1]
    squares_O, basis_OO = np.linalg.eigh(gram_OO)
    values_K = np.sqrt(np.maximum(squares_O[::-1], 0))[:columns]
    rank = int((values_K > _WEAKEST * values_K[0]).sum())
    if rank == 0:
        raise UserError(
            f"config field upscale.method='lesa': the {name} kernels of all layers are zero, there "
            "is nothing to learn from; use another method"
        )
    basis_OK = basis_OO[:, ::-1][:, :rank]
    largest_K = np.take_along_axis(basis_OK, np.abs(basis_OK).argmax(axis=0)[None], axis=0)[0]
    return Factors(basis_OK * np.sign(largest_K), values_K[:rank])


def coordinates_of(
    factors: Factors, kernel_OI: Float[np.ndarray, "o i"]
) -> Float[np.ndarray, "k i"]:
    """The kernel's part of V', float32: S^-1 U' W."""
    projected_KI = factors.basis_OK.T @ kernel_OI.astype(np.float64)
    return (projected_KI / factors.singular_values_K[:, None]).astype(np.float32)


def kernel_of(
    factors: Factors, coordinates_KI: Float[np.ndarray, "k i"]
) -> Float[np.ndarray, "o i"]:
    """The inverse of `coordinates_of`, float32: U S V'."""
    scaled_KI = factors.singular_values_K[:, None] * coordinates_KI.astype(np.float64)
    return (factors.basis_OK @ scaled_KI).astype(np.float32)
