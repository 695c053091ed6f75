"""The one Flax module: a pre-norm decoder block of the Llama family."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opt_deus_jax.distributed.sharding import constrain, gather_width, num_shards
from opt_deus_jax.models.attention import causal_attention, reference_attention
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.params import block_specs
from opt_deus_jax.models.products import project as multiply_kernel
from opt_deus_jax.models.rope import rotate
from opt_deus_jax.models.tree_attention import tree_attention


class BlockInputs(NamedTuple):
    """What every block of a forward pass shares.

    Attributes:
        cos_BTF: Cosines of the rotary embedding.
        sin_BTF: Its sines.
        example_BT: Without a cache: which example each token belongs to, where a row holds several
            that do not see each other.
        allowed_BTS: With a cache: which of its places each query may see.
        cache_start: With a cache: where this call's keys go, int32 scalar.
        ends_BT: For rows that are trees, without a cache: place after the last token that sees
            this one.
    """

    cos_BTF: Float[Array, "b t f"]
    sin_BTF: Float[Array, "b t f"]
    example_BT: Int[Array, "b t"] | None = None
    allowed_BTS: Bool[Array, "b t s"] | None = None
    cache_start: Array | None = None
    ends_BT: Int[Array, "b t"] | None = None


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


def _write(cache: KeyValueCache, seen: KeyValueCache, cache_start: Array) -> KeyValueCache:
    start = (0, cache_start, 0, 0)
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start),
        cache,
        seen,
    )


class DecoderBlock(nn.Module):
    """Attention and a gated MLP, each behind an RMSNorm and added to the residual stream.

    Its parameters are exactly `block_specs(config)`, flat, kernels [out, in].

    Attributes:
        config: The network.
        attention: An implementation of `causal_attention`; with a cache it is always `reference`,
            for trees `tree_attention`.
        kernel_dtype: Type of the kernels as multiplied; None takes that of the activations.
    """

    config: ModelConfig
    attention: str = "reference"
    kernel_dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "b t d"],
        inputs: BlockInputs,
        cache: KeyValueCache | None = None,
    ) -> tuple[Float[Array, "b t d"], KeyValueCache]:
        """Applies the block; parameters but kernels are cast to the dtype of `x_BTD`.

        Args:
            x_BTD: The residual stream.
            inputs: What all blocks share.
            cache: Keys and values of earlier calls, which this call's are written into.

        Returns:
            The residual stream, and the keys and values that were attended to.
        """
        specs, dtype = block_specs(self.config), x_BTD.dtype
        initializers = {
            "normal": nn.initializers.normal(self.config.initializer_range),
            "ones": nn.initializers.ones,
            "zeros": nn.initializers.zeros,
        }
        params = {
            # Cast first: what travels between devices is as small as what is multiplied.
            name: gather_width(
                self.param(name, initializers[spec.init], spec.shape, jnp.float32).astype(
                    (self.kernel_dtype or dtype) if name.endswith("_kernel") else dtype
                ),
                spec.logical_axes,
            )
            for name, spec in specs.items()
        }

        def project(name: str, x: Array) -> Array:
            kernel = params[f"{name}_kernel"]
            # Flat: with batch and time apart, XLA on CPU transposes, element by element, what the
            # gradient of the kernel is made from.
            flat_MD = x.reshape(-1, x.shape[-1])
            y = multiply_kernel(flat_MD, kernel).reshape(*x.shape[:2], -1)
            bias = params.get(f"{name}_bias")
            return y if bias is None else y + bias[None, None]

        x_BTD = constrain(x_BTD, "batch", "length", "gathered_width")
        normed = root_mean_square_norm(x_BTD, params["input_norm"], self.config.norm_epsilon)
        query, key, value = (project(name, normed) for name in ("query", "key", "value"))
        attended, seen = self._attend(query, key, value, inputs, cache)
        x_BTD = x_BTD + project("output", attended)
        x_BTD = constrain(x_BTD, "batch", "length", "gathered_width")
        normed = root_mean_square_norm(
            x_BTD, params["post_attention_norm"], self.config.norm_epsilon
        )
        gated = jax.nn.silu(project("gate", normed)) * project("up", normed)
        x_BTD = x_BTD + project("down", constrain(gated, "batch", "length", "mlp"))
        return constrain(x_BTD, "batch", "length", "gathered_width"), seen

    def _attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        inputs: BlockInputs,
        cache: KeyValueCache | None,
    ) -> tuple[Array, KeyValueCache]:
        def split_heads(x: Array, axis: str) -> Array:
            return constrain(
                x.reshape(*x.shape[:2], -1, self.config.head_dim),
                *("batch", "length", axis, "head_dim"),
            )

        # Fewer heads of keys than devices: each device then holds them all.
        kv_axis = (
            "kv_heads" if self.config.num_kv_heads % num_shards("kv_heads") == 0 else "all_kv_heads"
        )
        query = rotate(split_heads(query, "heads"), inputs.cos_BTF, inputs.sin_BTF)
        key = rotate(split_heads(key, kv_axis), inputs.cos_BTF, inputs.sin_BTF)
        seen = KeyValueCache(key, split_heads(value, kv_axis))
        if inputs.ends_BT is not None:
            attended = tree_attention(query, *seen, inputs.ends_BT)
        elif cache is None:
            attended = causal_attention(query, *seen, inputs.example_BT, self.attention)
        else:
            assert inputs.cache_start is not None
            assert inputs.allowed_BTS is not None
            seen = _write(cache, seen, inputs.cache_start)
            attended = reference_attention(query, *seen, inputs.allowed_BTS)
        return constrain(
            attended.reshape(*attended.shape[:2], -1), "batch", "length", "heads"
        ), seen
