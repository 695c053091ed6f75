"""Rotations and phases that bring one set of vectors nearest to another, in closed form.

Names carry shapes: H dimensions of a space that may be rotated, F complex planes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Complex, Float


class Rotation(NamedTuple):
    """The orthogonal map that is nearest to aligning two sets, and what it reaches.

    Attributes:
        rotation_HH: Apply it to the vectors of the source, as `rotation_HH @ source_HD`.
        overlap: Inner product of the rotated source with the target: the nuclear norm.
    """

    rotation_HH: Float[np.ndarray, "*b h h"]
    overlap: Float[np.ndarray, "*b"]


def nearest_rotation(overlap_HH: Float[np.ndarray, "*b h h"]) -> Rotation:
    """Solves the orthogonal Procrustes problem (Schoenemann 1966).

    Among all orthogonal maps R it finds the one with the greatest <R X, Y>. Equals
    `scipy.linalg.orthogonal_procrustes`.

    Args:
        overlap_HH: X Y' for source X and target Y, both [h, d]; several at once in the leading
            dimensions. Sums of such products stand for sets that share one rotation.

    Returns:
        The rotation and <R X, Y>, which is the nuclear norm of X Y'.
    """
    left, singular, right = np.linalg.svd(overlap_HH)
    rotation = np.swapaxes(left @ right, -1, -2)
    return Rotation(rotation, singular.sum(axis=-1))


def nuclear_norm(overlap_HH: Float[np.ndarray, "*b h h"]) -> Float[np.ndarray, "*b"]:
    """The greatest overlap that a rotation can reach, without the rotation."""
    return np.linalg.svd(overlap_HH, compute_uv=False).sum(axis=-1)


def nearest_phase(overlap_F: Complex[np.ndarray, "*f"]) -> Complex[np.ndarray, "*f"]:
    """The unit number z with the greatest Re(z c) for every overlap c; 1 where c is 0.

    Args:
        overlap_F: sum of x conj(y) over the entries of a source x and a target y in one plane; z x
            is then the source turned nearest to the target, and Re(z c) is |c|.

    Returns:
        One unit number for each.
    """
    size_F = np.abs(overlap_F)
    safe_F = np.where(size_F > 0, size_F, 1)
    return np.where(size_F > 0, np.conj(overlap_F) / safe_F, 1).astype(overlap_F.dtype)
