"""The one Flax module: a pre-norm decoder block of the Llama family."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from opt_deus_jax.models.attention import matmul_precision, reference_attention
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.params import block_specs
from opt_deus_jax.models.rope import rotate


class BlockInputs(NamedTuple):
    """What every block of a forward pass shares.

    Attributes:
        cos_BTF: Cosines of the rotary embedding.
        sin_BTF: Its sines.
        allowed_BTS: Which keys each query may see.
        cache_start: Where this call's keys go in the cache, int32 scalar; unused without a cache.
    """

    cos_BTF: Float[Array, "b t f"]
    sin_BTF: Float[Array, "b t f"]
    allowed_BTS: Bool[Array, "b t s"]
    cache_start: Array


class KeyValueCache(NamedTuple):
    """Keys and values of one block, [b, s, kv heads, head_dim]."""

    key_BSKH: Array
    value_BSKH: Array


def root_mean_square_norm(
    x: Float[Array, "*b d"], scale_D: Float[Array, " d"], epsilon: float
) -> Float[Array, "*b d"]:
    """RMSNorm in float32, as transformers' LlamaRMSNorm.

    Args:
        x: Activations.
        scale_D: The learned scale.
        epsilon: Added to the mean square.

    Returns:
        The shape and dtype of x.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    scale = scale_D.astype(x.dtype).reshape((1,) * (x.ndim - 1) + scale_D.shape)
    return normed.astype(x.dtype) * scale


class DecoderBlock(nn.Module):
    """Attention and a gated MLP, each behind an RMSNorm and added to the residual stream.

    Its parameters are exactly `block_specs(config)`, flat, kernels [out, in].
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "b t d"],
        inputs: BlockInputs,
        cache: KeyValueCache | None = None,
    ) -> tuple[Float[Array, "b t d"], KeyValueCache]:
        """Applies the block; kernels are cast to the dtype of `x_BTD`.

        Args:
            x_BTD: The residual stream.
            inputs: What all blocks share.
            cache: Keys and values of earlier calls, which this call's are written into.

        Returns:
            The residual stream, and the keys and values that were attended to.
        """
        config = self.config
        initializers = {
            "normal": nn.initializers.normal(config.initializer_range),
            "ones": nn.initializers.ones,
            "zeros": nn.initializers.zeros,
        }
        params = {
            name: self.param(name, initializers[spec.init], spec.shape, jnp.float32)
            for name, spec in block_specs(config).items()
        }

        def project(name: str, x: Array) -> Array:
            kernel = params[f"{name}_kernel"].astype(x.dtype)
            y = jnp.einsum("btd,od->bto", x, kernel, precision=matmul_precision(x.dtype))
            bias = params.get(f"{name}_bias")
            return y if bias is None else y + bias.astype(x.dtype)[None, None]

        def split_heads(x: Array) -> Array:
            return x.reshape(*x.shape[:2], -1, config.head_dim)

        normed = root_mean_square_norm(x_BTD, params["input_norm"], config.norm_epsilon)
        query = rotate(split_heads(project("query", normed)), inputs.cos_BTF, inputs.sin_BTF)
        key = rotate(split_heads(project("key", normed)), inputs.cos_BTF, inputs.sin_BTF)
        seen = KeyValueCache(key, split_heads(project("value", normed)))
        if cache is not None:
            start = (0, inputs.cache_start, 0, 0)
            seen = jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start),
                cache,
                seen,
            )
        attended = reference_attention(
            query, seen.key_BSKH, seen.value_BSKH, inputs.allowed_BTS
        ).reshape(*x_BTD.shape[:2], -1)
        x_BTD = x_BTD + project("output", attended)
        normed = root_mean_square_norm(x_BTD, params["post_attention_norm"], config.norm_epsilon)
        gated = jax.nn.silu(project("gate", normed)) * project("up", normed)
        return x_BTD + project("down", gated), seen
