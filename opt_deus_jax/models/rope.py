"""Rotary position embeddings: read from config.json, and computed."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from opt_deus_jax.errors import UserError

# Fields of each kind beside the kind itself and theta: those that it needs, those that it may have.
_KEYS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset(
            {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        ),
        frozenset(),
    ),
    "yarn": (
        frozenset({"factor"}),
        frozenset(
            {
                *("original_max_position_embeddings", "attention_factor", "beta_fast"),
                *("beta_slow", "mscale", "mscale_all_dim", "truncate"),
            }
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        theta: Base of the frequencies.
        kind: `default`, `linear` (position interpolation), `llama3` or `yarn`.
        factor: How much longer the context is than the original one.
        low_frequency_factor: For `llama3`: wavelengths above original/low are stretched.
        high_frequency_factor: For `llama3`: wavelengths below original/high are kept.
        original_max_positions: For `llama3` and `yarn`: the context of pre-training.
        fraction: Which part of each head, from its beginning, is rotated.
        table_factor: For `yarn`: what sines and cosines are multiplied by.
        beta_fast: For `yarn`: pairs that turn more often than this in the original context are
            kept.
        beta_slow: For `yarn`: pairs that turn less often than this are stretched.
        truncate: For `yarn`: whether the bounds between the two are whole pairs.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 1.0
    original_max_positions: int = 0
    fraction: float = 1.0
    table_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_rope(
    given: Any,
    theta: Any,
    *,
    kinds: Sequence[str],
    max_positions: int,
    fraction: Any = None,
    where: str,
) -> RopeConfig:
    """Translates one rotary embedding of a config.json, in the style of either transformers.

    Args:
        given: `rope_parameters`, or `rope_scaling` as written before transformers 5; may be None.
        theta: The base of the frequencies where `given` has none.
        kinds: The kinds that the architecture may have.
        max_positions: The context of the network.
        fraction: Part of each head that is rotated where `given` does not say; None for an
            architecture that always rotates all of it.
        where: What error messages call the config.

    Returns:
        The rotary embedding.

    Raises:
        UserError: An unknown kind or field, or a value of the wrong type.
    """
    given = given or {}
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: field rope_scaling={given!r} must be an object or null")
    # A field that is null is one that is not there.
    fields: dict[str, Any] = {k: v for k, v in given.items() if v is not None or k == "factor"}
    theta = fields.pop("rope_theta", theta)
    kind = fields.pop("rope_type", fields.pop("type", "default"))
    fields.pop("type", None)
    fraction = 1.0 if fraction is None else fields.pop("partial_rotary_factor", fraction)
    if kind not in kinds:
        raise UserError(
            f"{where}: rope type {kind!r} is not supported; use a checkpoint with one of "
            f"{', '.join(kinds)}"
        )
    truncate = fields.pop("truncate", True) if kind == "yarn" else True
    if not all(is_number(value) for value in (theta, fraction, *fields.values())):
        raise UserError(f"{where}: rope_theta={theta!r} and {fields} must be numbers")
    _check_keys(kind, fields, where)
    original = fields.get("original_max_position_embeddings", max_positions * (kind == "yarn"))
    return RopeConfig(
        theta=float(theta),
        kind=kind,
        factor=float(fields.get("factor", 1.0)),
        low_frequency_factor=float(fields.get("low_freq_factor", 1.0)),
        high_frequency_factor=float(fields.get("high_freq_factor", 1.0)),
        original_max_positions=int(original),
        fraction=float(fraction),
        table_factor=_yarn_table_factor(fields) if kind == "yarn" else 1.0,
        beta_fast=float(fields.get("beta_fast") or 32.0),
        beta_slow=float(fields.get("beta_slow") or 1.0),
        truncate=bool(truncate),
    )


def _check_keys(kind: str, fields: Mapping[str, Any], where: str) -> None:
    needed, allowed = _KEYS[kind]
    if not needed <= set(fields) <= needed | allowed:
        may = f" and may have {sorted(allowed)}" if allowed else ""
        raise UserError(
            f"{where}: rope type {kind!r} needs exactly the fields {sorted(needed)}{may}, "
            f"found {sorted(fields)}; correct rope_scaling"
        )


def _yarn_table_factor(fields: Mapping[str, Any]) -> float:
    if "attention_factor" in fields:
        return float(fields["attention_factor"])
    factor = float(fields["factor"])

    def scaled(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    if fields.get("mscale") and fields.get("mscale_all_dim"):
        return scaled(fields["mscale"]) / scaled(fields["mscale_all_dim"])
    return scaled(1.0)


def _yarn_frequencies(rope: RopeConfig, frequencies: np.ndarray, size: int) -> np.ndarray:
    """Peng et al. 2023, arXiv 2309.00071, as transformers computes it."""

    def pair_that_turns(times: float) -> float:
        turns = rope.original_max_positions / (times * 2 * math.pi)
        return size * math.log(turns) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    stretched = np.clip((np.arange(size // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return frequencies / rope.factor * stretched + frequencies * (1 - stretched)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Angular frequency of every rotary pair, scaled as the config asks.

    Equals transformers' `ROPE_INIT_FUNCTIONS` of the same names.

    Args:
        rope: Kind and factors.
        head_dim: Size of a head.

    Returns:
        float32, radians a position; a number for every pair of dimensions that is rotated.
    """
    size = int(head_dim * rope.fraction)
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequencies = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, frequencies, size).astype(np.float32)
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
        head_dim: Size of a head; 2 f where all of it is rotated.
        positions_BT: Position of each token.

    Returns:
        (cosines, sines), each [b, t, f].
    """
    frequencies_F = jnp.asarray(inverse_frequencies(rope, head_dim))
    angles_BTF = positions_BT.astype(jnp.float32)[..., None] * frequencies_F[None, None]
    cos_BTF, sin_BTF = jnp.cos(angles_BTF), jnp.sin(angles_BTF)
    if rope.table_factor == 1:
        return cos_BTF, sin_BTF
    return cos_BTF * rope.table_factor, sin_BTF * rope.table_factor


def rotate(
    x_BTNH: Float[Array, "b t n h"], cos_BTF: Float[Array, "b t f"], sin_BTF: Float[Array, "b t f"]
) -> Float[Array, "b t n h"]:
    """Rotates each pair (i, i + f) of every head, in the convention of transformers' Llama.

    What of a head lies beyond its first 2 f dimensions is left as it is.

    Args:
        x_BTNH: Queries or keys.
        cos_BTF: Cosines from `rotary_tables`.
        sin_BTF: Sines from `rotary_tables`.

    Returns:
        The same shape and dtype.
    """
    pairs = cos_BTF.shape[-1]
    first, second, rest = jnp.split(x_BTNH, [pairs, 2 * pairs], axis=-1)
    cos = cos_BTF[:, :, None].astype(x_BTNH.dtype)
    sin = sin_BTF[:, :, None].astype(x_BTNH.dtype)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned + [rest] * (rest.shape[-1] > 0), axis=-1)
