"""Attention, chosen by name."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from opt_deus_jax.errors import UserError

# What the backward pass of a fused attention needs of its forward pass, as remat policies know it.
ATTENDED = "attended"
_SPLASH_LANES = 128
_SPLASH_BLOCKS = (512, 256, 128)
_QUERY_PARTS, _SMALLEST_PART = 4, 64
_BATCH_AXES = ("data", "fsdp")


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """float32 means float32 on every backend; lower types take the hardware's own products."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def check_attention(
    implementation: str,
    *,
    platform: str,
    compute_dtype: str,
    packed: bool,
    head_dim: int,
    soft_cap: float | None,
) -> None:
    """Refuses an attention that the devices, the types or the data do not allow.

    Args:
        implementation: `reference`, `cudnn` or `splash`.
        platform: `cpu`, `gpu` or `tpu`, as `jax.Device.platform` names it; `cuda` is `gpu`.
        compute_dtype: Type of the activations.
        packed: Whether a sequence may hold several examples.
        head_dim: Size of a head.
        soft_cap: That of the scores, if there is one.

    Raises:
        UserError: It cannot be used; the message names the field to change.
    """
    field = f"config field training.attention={implementation!r}"
    if implementation == "splash" and platform != "tpu":
        raise UserError(f"{field}: needs a TPU, the devices are {platform}; use reference or cudnn")
    if implementation != "cudnn":
        return
    if platform not in ("gpu", "cuda"):
        raise UserError(
            f"{field}: needs an NVIDIA GPU, the devices are {platform}; use reference or splash"
        )
    if compute_dtype != "bfloat16":
        raise UserError(
            f"{field}: needs training.compute_dtype=bfloat16, not {compute_dtype}; "
            "or use training.attention=reference"
        )
    if packed:
        raise UserError(
            f"{field}: cannot keep packed examples apart; set data.packing=False or use "
            "training.attention=reference"
        )
    if soft_cap is not None:
        raise UserError(
            f"{field}: has no cap of the scores, which the model has at {soft_cap}; use "
            "training.attention=reference"
        )
    if head_dim % 8 or head_dim > 256:
        raise UserError(
            f"{field}: needs heads of a multiple of 8 up to 256, the model's have {head_dim}; "
            "use training.attention=reference"
        )


class Scoring(NamedTuple):
    """How queries and keys make scores, as static facts of a layer.

    Attributes:
        scale: What products of queries and keys are multiplied by; None for 1 / sqrt(h).
        soft_cap: Then c tanh(x / c) is taken of them, where this c is not None.
        window: How many tokens each sees at most, itself included; None for all.
    """

    scale: float | None = None
    soft_cap: float | None = None
    window: int | None = None


PLAIN = Scoring()


def cap_softly(x: Array, soft_cap: float | None) -> Array:
    """Returns c tanh(x / c), which stays within c; x where there is no c."""
    return x if soft_cap is None else soft_cap * jnp.tanh(x / soft_cap)


def reference_attention(
    query_BTNH: Float[Array, "b t n h"],
    key_BSKH: Float[Array, "b s k h"],
    value_BSKH: Float[Array, "b s k h"],
    allowed_BTS: Bool[Array, "b t s"],
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "b t n h"]:
    """Grouped-query attention with the softmax in float32 and all scores in memory.

    Args:
        query_BTNH: Rotated queries; head n belongs to KV head n // (n / k).
        key_BSKH: Rotated keys.
        value_BSKH: Values.
        allowed_BTS: Which keys each query may see; every row needs one. A first dimension of 1
            holds for the whole batch.
        scale: What products of queries and keys are multiplied by; None for 1 / sqrt(h).
        soft_cap: Then c tanh(x / c) is taken of them, where this c is not None.

    Returns:
        The attended values, in the dtype of the queries.
    """
    batch, length, num_heads, head_dim = query_BTNH.shape
    num_kv_heads = key_BSKH.shape[2]
    precision = matmul_precision(query_BTNH.dtype)
    # One batch of plain products, a query head's rows after another's: no score is transposed, here
    # or in the gradients.
    query_BKMH = jnp.moveaxis(query_BTNH, 1, 2).reshape(batch, num_kv_heads, -1, head_dim)
    key_BKSH, value_BKSH = (jnp.moveaxis(x, 1, 2) for x in (key_BSKH, value_BSKH))
    scores_BKMS = jnp.einsum(
        "bkmh,bksh->bkms",
        query_BKMH,
        key_BKSH,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    scores_BNTS = scores_BKMS.reshape(batch, num_heads, length, -1)
    scores_BNTS = scores_BNTS * (head_dim**-0.5 if scale is None else scale)
    scores_BNTS = cap_softly(scores_BNTS, soft_cap)
    scores_BNTS = jnp.where(allowed_BTS[:, None], scores_BNTS, -jnp.inf)
    highest_BNT1 = jax.lax.stop_gradient(jnp.max(scores_BNTS, axis=-1, keepdims=True))
    weights_BNTS = jnp.exp(scores_BNTS - highest_BNT1)
    attended_BKMH = jnp.einsum(
        "bkms,bksh->bkmh",
        weights_BNTS.astype(value_BSKH.dtype).reshape(scores_BKMS.shape),
        value_BKSH,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    attended_BKMH = checkpoint_name(attended_BKMH, ATTENDED)
    attended_BNTH = attended_BKMH.reshape(batch, num_heads, length, -1)
    # Normalised last, where there is least to divide.
    attended_BNTH = attended_BNTH / jnp.sum(weights_BNTS, axis=-1, keepdims=True)
    return jnp.moveaxis(attended_BNTH, 1, 2).astype(query_BTNH.dtype)


def causal_mask(
    length: int, example_BT: Int[Array, "b t"] | None = None, window: int | None = None
) -> Bool[Array, "b t t"] | Bool[Array, "1 t t"]:
    """Which keys each query may see: those before it, its own, and of its own example only.

    Args:
        length: Tokens a sequence.
        example_BT: Number of the example that each token belongs to, or None for one in all.
        window: How many tokens each sees at most, itself included; None for all.

    Returns:
        True where a key may be seen; the first dimension is 1 without examples.
    """
    places_T = jnp.arange(length)
    distance_1TT = (places_T[:, None] - places_T[None])[None]
    causal_1TT = distance_1TT >= 0
    if window is not None:
        causal_1TT = causal_1TT & (distance_1TT < window)
    if example_BT is None:
        return causal_1TT
    return causal_1TT & (example_BT[:, :, None] == example_BT[:, None])


def _query_parts(length: int) -> list[tuple[int, int]]:
    # Four parts leave out three eighths of all pairs; more would gain little and compile longer.
    size = max(_SMALLEST_PART, -(-length // _QUERY_PARTS))
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def causal_attention(
    query_BTNH: Float[Array, "b t n h"],
    key_BTKH: Float[Array, "b t k h"],
    value_BTKH: Float[Array, "b t k h"],
    example_BT: Int[Array, "b t"] | None,
    implementation: str,
    scoring: Scoring = PLAIN,
) -> Float[Array, "b t n h"]:
    """Causal self-attention of a whole sequence, differentiable.

    Args:
        query_BTNH: Rotated queries; head n belongs to KV head n // (n / k).
        key_BTKH: Rotated keys.
        value_BTKH: Values.
        example_BT: Number of the example that each token belongs to, which it does not look
            beyond; None where a sequence is one example.
        implementation: `reference`, `cudnn` or `splash`; never replaced by another.
        scoring: How scores are made, and how far back a token sees.

    Returns:
        The attended values, in the dtype of the queries.

    Raises:
        UserError: `cudnn` is given examples, whose dense masks it does not compute reliably, or a
            cap, which it does not have.
        ValueError: The implementation is unknown.
    """
    if implementation == "reference":
        allowed = causal_mask(query_BTNH.shape[1], example_BT, scoring.window)
        parts = []
        for first, last in _query_parts(query_BTNH.shape[1]):
            # Keys after the last query, or before the first one's window, are not even looked at.
            start = 0 if scoring.window is None else max(0, first - scoring.window + 1)
            keys, values = key_BTKH[:, start:last], value_BTKH[:, start:last]
            seen, queries = allowed[:, first:last, start:last], query_BTNH[:, first:last]
            parts.append(
                reference_attention(
                    *(queries, keys, values, seen), scale=scoring.scale, soft_cap=scoring.soft_cap
                )
            )
        return jnp.concatenate(parts, axis=1)
    if implementation == "splash":
        return splash_attention(query_BTNH, key_BTKH, value_BTKH, example_BT, scoring)
    if implementation == "cudnn":
        return _cudnn(query_BTNH, key_BTKH, value_BTKH, example_BT, scoring)
    raise ValueError(f"unknown attention {implementation!r}")


def _cudnn(
    query_BTNH: Array,
    key_BTKH: Array,
    value_BTKH: Array,
    example_BT: Array | None,
    scoring: Scoring,
) -> Array:
    if example_BT is not None:
        raise UserError(
            "config field training.attention='cudnn': cannot keep packed examples apart; "
            "set data.packing=False or use training.attention=reference"
        )
    if scoring.soft_cap is not None:
        raise UserError(
            "config field training.attention='cudnn': has no cap of the scores; use "
            "training.attention=reference"
        )
    return jax.nn.dot_product_attention(
        query_BTNH,
        key_BTKH,
        value_BTKH,
        scale=scoring.scale,
        is_causal=True,
        local_window_size=None if scoring.window is None else (scoring.window - 1, 0),
        implementation="cudnn",
    )


def splash_attention(
    query_BTNH: Float[Array, "b t n h"],
    key_BTKH: Float[Array, "b t k h"],
    value_BTKH: Float[Array, "b t k h"],
    example_BT: Int[Array, "b t"] | None,
    scoring: Scoring = PLAIN,
    *,
    interpret: bool = False,
) -> Float[Array, "b t n h"]:
    """Causal flash attention by JAX's Pallas kernel for TPU, under the current mesh.

    Each device runs the kernel on its own sequences ('data' and 'fsdp') and heads ('tensor', where
    it divides them; KV heads are repeated where there are fewer than devices).

    Args:
        query_BTNH: Rotated queries.
        key_BTKH: Rotated keys.
        value_BTKH: Values.
        example_BT: Number of the example that each token belongs to, or None.
        scoring: How scores are made, and how far back a token sees.
        interpret: Whether to run the kernel as JAX operations, on any device.

    Returns:
        The attended values, in the dtype of the queries.
    """
    local = functools.partial(_local_splash, scoring=scoring, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(query_BTNH, key_BTKH, value_BTKH, example_BT)
    num_heads, num_kv_heads, shards = query_BTNH.shape[2], key_BTKH.shape[2], mesh.shape["tensor"]
    held_kv_heads = math.lcm(num_kv_heads, shards)
    head_axis = None
    if num_heads % held_kv_heads == 0:
        head_axis = "tensor"
        repeats = held_kv_heads // num_kv_heads
        key_BTKH = jnp.repeat(key_BTKH, repeats, axis=2)
        value_BTKH = jnp.repeat(value_BTKH, repeats, axis=2)
    heads = PartitionSpec(_BATCH_AXES, None, head_axis, None)

    return jax.shard_map(
        local,
        in_specs=(heads, heads, heads, PartitionSpec(_BATCH_AXES, None)),
        out_specs=heads,
        check_vma=False,  # The kernel does not say over which axes its outputs vary.
    )(query_BTNH, key_BTKH, value_BTKH, example_BT)


def _local_splash(
    query_BTNH: Array,
    key_BTKH: Array,
    value_BTKH: Array,
    example_BT: Array | None,
    *,
    scoring: Scoring,
    interpret: bool,
) -> Array:
    length, num_heads, head_dim = query_BTNH.shape[1:]
    # Padded keys come last, where no query of the sequence can see them.
    padding = -length % _SPLASH_LANES
    padded = length + padding

    def heads_first(x_BTNH: Array) -> Array:
        return jnp.pad(x_BTNH, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)

    block = next(block for block in _SPLASH_BLOCKS if padded % block == 0)
    mask: Any = splash.CausalMask((padded, padded))
    if scoring.window is not None:
        mask = splash.LocalMask((padded, padded), window_size=(scoring.window - 1, 0), offset=0)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * num_heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=scoring.soft_cap,
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )
    scale = head_dim**-0.5 if scoring.scale is None else scoring.scale
    arrays = tuple(map(heads_first, (query_BTNH * scale, key_BTKH, value_BTKH)))
    segments = None
    if example_BT is not None:
        example_BT = jnp.pad(example_BT, ((0, 0), (0, padding)))
        segments = splash.SegmentIds(example_BT, example_BT)
    attended_BNTH: Any = jax.vmap(kernel)(*arrays, segments)
    return attended_BNTH.swapaxes(1, 2)[:, :length]
