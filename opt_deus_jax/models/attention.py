"""Attention, chosen by name."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """float32 means float32 on every backend; lower types take the hardware's own products."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def reference_attention(
    query_BTNH: Float[Array, "b t n h"],
    key_BSKH: Float[Array, "b s k h"],
    value_BSKH: Float[Array, "b s k h"],
    allowed_BTS: Bool[Array, "b t s"],
) -> Float[Array, "b t n h"]:
    """Grouped-query attention with the softmax in float32 and all scores in memory.

    Args:
        query_BTNH: Rotated queries; head n belongs to KV head n // (n / k).
        key_BSKH: Rotated keys.
        value_BSKH: Values.
        allowed_BTS: Which keys each query may see; every row needs one.

    Returns:
        The attended values, in the dtype of the queries.
    """
    batch, length, num_heads, head_dim = query_BTNH.shape
    num_kv_heads = key_BSKH.shape[2]
    precision = matmul_precision(query_BTNH.dtype)
    grouped_BTKGH = query_BTNH.reshape(
        batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim
    )
    scores_BKGTS = jnp.einsum(
        "btkgh,bskh->bkgts",
        grouped_BTKGH,
        key_BSKH,
        precision=precision,
        preferred_element_type=jnp.float32,
    ) * (head_dim**-0.5)
    scores_BKGTS = jnp.where(allowed_BTS[:, None, None], scores_BKGTS, -jnp.inf)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(value_BSKH.dtype)
    attended_BTKGH = jnp.einsum("bkgts,bskh->btkgh", weights_BKGTS, value_BSKH, precision=precision)
    return attended_BTKGH.reshape(query_BTNH.shape)
