"""Rotary position embeddings."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from opt_deus_jax.models.model_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Angular frequency of every rotary pair, scaled as the config asks.

    Equals transformers' `ROPE_INIT_FUNCTIONS` of the same names.

    Args:
        rope: Kind and factors.
        head_dim: Size of a head.

    Returns:
        float32 [head_dim / 2], radians a position.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        low = rope.original_max_positions / rope.low_frequency_factor
        high = rope.original_max_positions / rope.high_frequency_factor
        smooth = (rope.original_max_positions / wavelengths - rope.low_frequency_factor) / (
            rope.high_frequency_factor - rope.low_frequency_factor
        )
        blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
        scaled = np.where(wavelengths > low, frequencies / rope.factor, blended)
        return np.where(wavelengths < high, frequencies, scaled).astype(np.float32)
    return frequencies


def rotary_tables(
    rope: RopeConfig, head_dim: int, positions_BT: Int[Array, "b t"]
) -> tuple[Float[Array, "b t f"], Float[Array, "b t f"]]:
    """Cosines and sines of the rotation at each position, float32.

    Args:
        rope: Kind and factors.
        head_dim: Size of a head, 2 f.
        positions_BT: Position of each token.

    Returns:
        (cosines, sines), each [b, t, head_dim / 2].
    """
    frequencies_F = jnp.asarray(inverse_frequencies(rope, head_dim))
    angles_BTF = positions_BT.astype(jnp.float32)[..., None] * frequencies_F[None, None]
    return jnp.cos(angles_BTF), jnp.sin(angles_BTF)


def rotate(
    x_BTNH: Float[Array, "b t n h"], cos_BTF: Float[Array, "b t f"], sin_BTF: Float[Array, "b t f"]
) -> Float[Array, "b t n h"]:
    """Rotates each pair (i, i + h/2) of every head, in the convention of transformers' Llama.

    Args:
        x_BTNH: Queries or keys.
        cos_BTF: Cosines from `rotary_tables`.
        sin_BTF: Sines from `rotary_tables`.

    Returns:
        The same shape and dtype.
    """
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    cos = cos_BTF[:, :, None].astype(x_BTNH.dtype)
    sin = sin_BTF[:, :, None].astype(x_BTNH.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
