"""The one Flax module: a decoder block, built by the facts of its architecture."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opt_deus_jax.distributed.sharding import constrain, gather_width, num_shards
from opt_deus_jax.models.attention import Scoring, causal_attention, reference_attention
from opt_deus_jax.models.layer_kinds import LayerKind
from opt_deus_jax.models.model_config import ModelConfig, NormConfig
from opt_deus_jax.models.moe import apply_experts, route, sum_load
from opt_deus_jax.models.params import ParamSpec, block_specs
from opt_deus_jax.models.products import project as multiply_kernel
from opt_deus_jax.models.rope import rotate
from opt_deus_jax.models.tree_attention import tree_attention


class BlockInputs(NamedTuple):
    """What every block of a forward pass shares.

    Attributes:
        rotary_tables: Cosines and sines of each rotary embedding of the network.
        positions_BT: Position of each token in its sequence.
        example_BT: Without a cache: which example each token belongs to, where a row holds several
            that do not see each other.
        allowed_BTS: With a cache: which of its places each query may see.
        cache_start: With a cache: where this call's keys go, int32 scalar.
        ends_BT: For rows that are trees, without a cache: place after the last token that sees
            this one.
    """

    rotary_tables: tuple[tuple[Float[Array, "b t f"], Float[Array, "b t f"]], ...]
    positions_BT: Int[Array, "b t"]
    example_BT: Int[Array, "b t"] | None = None
    allowed_BTS: Bool[Array, "b t s"] | None = None
    cache_start: Array | None = None
    ends_BT: Int[Array, "b t"] | None = None


# Tokens of a device that a CPU multiplies with kernels at once where nothing is trained: more are
# slower, for what they make leaves the cache.
_CPU_TOKENS = 512
# The collection into which a block with experts sows its `RouterLoad`, where it is mutable.
ROUTER_LOAD = "router_load"


class KeyValueCache(NamedTuple):
    """Keys and values of one block, [b, s, kv heads, head_dim]."""

    key_BSKH: Array
    value_BSKH: Array


def root_mean_square_norm(
    x: Float[Array, "*b d"], scale_D: Float[Array, " d"], norm: NormConfig
) -> Float[Array, "*b d"]:
    """RMSNorm in float32, as the norms of transformers' models.

    Args:
        x: Activations.
        scale_D: The learned scale, as it is stored.
        norm: How it is applied.

    Returns:
        The shape and dtype of x.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + norm.epsilon)
    scale = scale_D.astype(jnp.float32 if norm.in_float32 else x.dtype)
    scale = scale.reshape((1,) * (x.ndim - 1) + scale_D.shape)
    if norm.offset:
        scale = scale + norm.offset
    if norm.in_float32:
        return (normed * scale).astype(x.dtype)
    return normed.astype(x.dtype) * scale


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def _write(cache: KeyValueCache, seen: KeyValueCache, cache_start: Array) -> KeyValueCache:
    start = (0, cache_start, 0, 0)
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start),
        cache,
        seen,
    )


class DecoderBlock(nn.Module):
    """Attention and a gated MLP, or several, each with its norms and added to the residual stream.

    Its parameters are exactly `block_specs(config, kind)`, flat, kernels [out, in].

    Attributes:
        config: The network; its depth does not matter.
        kind: What this layer computes differently from others.
        attention: An implementation of `causal_attention`; with a cache it is always `reference`,
            for trees `tree_attention`.
        kernel_dtype: Type of the kernels as multiplied; None takes that of the activations.
        experts: An implementation of `moe.apply_experts`.
    """

    config: ModelConfig
    kind: LayerKind
    attention: str = "reference"
    kernel_dtype: jnp.dtype | None = None
    experts: str = "dense"

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
        config, dtype = self.config, x_BTD.dtype
        params = self._params(dtype)

        def norm(name: str, x: Array) -> Array:
            # Architectures leave out different ones.
            return root_mean_square_norm(x, params[name], config.norm) if name in params else x

        def add(x_BTD: Array, name: str, branch: Array) -> Array:
            branch = norm(name, branch)
            if config.residual_multiplier != 1:
                branch = branch * config.residual_multiplier
            return constrain(x_BTD + branch, "batch", "length", "gathered_width")

        project = functools.partial(_project, params)
        # Only where nothing goes back through it: a scan would store its pieces once more.
        each = _apply if inputs.ends_BT is None else _apply_in_pieces
        x_BTD = constrain(x_BTD, "batch", "length", "gathered_width")
        normed = norm("input_norm", x_BTD)
        query, key, value = each(
            lambda x: tuple(project(name, x) for name in ("query", "key", "value")), normed
        )
        attended, seen = self._attend(query, key, value, params, inputs, cache)
        branch = each(functools.partial(project, "output"), attended)
        x_BTD = add(x_BTD, "attention_output_norm", branch)
        normed = norm("post_attention_norm", x_BTD)
        if self.kind.has_experts:
            branch = self._experts(normed, params, inputs)
        else:
            branch = each(functools.partial(self._mlp, params), normed)
        return add(x_BTD, "mlp_output_norm", branch), seen

    def _mlp(self, params: Mapping[str, Array], normed: Array) -> Array:
        activation = ACTIVATIONS[self.config.activation]
        gated = activation(_project(params, "gate", normed)) * _project(params, "up", normed)
        return _project(params, "down", constrain(gated, "batch", "length", "mlp"))

    def _experts(self, normed: Array, params: Mapping[str, Array], inputs: BlockInputs) -> Array:
        experts, example_BT = self.config.experts, inputs.example_BT
        assert experts is not None
        flat_MD = normed.reshape(-1, normed.shape[-1])
        routing = route(flat_MD, params["router_kernel"], experts)
        is_real_M = None if example_BT is None else example_BT.reshape(-1) > 0
        self.sow(ROUTER_LOAD, "load", sum_load(routing, is_real_M))
        activation = ACTIVATIONS[self.config.activation]
        made_MD = apply_experts(flat_MD, routing, params, activation, self.experts)
        return made_MD.reshape(normed.shape)

    def _params(self, dtype: jnp.dtype) -> dict[str, Array]:
        initializers = {
            "normal": nn.initializers.normal(self.config.initializer_range),
            "ones": nn.initializers.ones,
            "zeros": nn.initializers.zeros,
        }

        def param(name: str, spec: ParamSpec) -> Array:
            value = self.param(name, initializers[spec.init], spec.shape, jnp.float32)
            # Near the identity a scale of -1 + x would lose its x to the compute dtype.
            is_float32 = name.endswith("_norm") and self.config.norm.in_float32
            # A choice is not to hang on rounding more than it must.
            is_kernel = name.endswith("_kernel") and name != "router_kernel"
            to = jnp.float32 if is_float32 else (is_kernel and self.kernel_dtype) or dtype
            # Cast first: what travels between devices is as small as what is multiplied.
            return gather_width(value.astype(to), spec.logical_axes)

        return {
            name: param(name, spec) for name, spec in block_specs(self.config, self.kind).items()
        }

    def _attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        params: Mapping[str, Array],
        inputs: BlockInputs,
        cache: KeyValueCache | None,
    ) -> tuple[Array, KeyValueCache]:
        config, kind = self.config, self.kind
        scoring = Scoring(config.attention_scale, config.attention_soft_cap, kind.window)

        def split_heads(x: Array, axis: str) -> Array:
            return constrain(
                x.reshape(*x.shape[:2], -1, config.head_dim),
                *("batch", "length", axis, "head_dim"),
            )

        def prepare(x: Array, name: str, axis: str) -> Array:
            scale = params.get(name)
            if scale is not None and config.facts.query_key_norm == "projection":
                x = root_mean_square_norm(x, scale, config.norm)
            x = split_heads(x, axis)
            if scale is not None and config.facts.query_key_norm == "head":
                x = root_mean_square_norm(x, scale, config.norm)
            return x if kind.rope is None else rotate(x, *inputs.rotary_tables[kind.rope])

        # Fewer heads of keys than devices: each device then holds them all.
        kv_axis = (
            "kv_heads" if config.num_kv_heads % num_shards("kv_heads") == 0 else "all_kv_heads"
        )
        query = prepare(query, "query_norm", "heads")
        seen = KeyValueCache(prepare(key, "key_norm", kv_axis), split_heads(value, kv_axis))
        if inputs.ends_BT is not None:
            attended = tree_attention(query, *seen, inputs.ends_BT, inputs.positions_BT, scoring)
        elif cache is None:
            attended = causal_attention(query, *seen, inputs.example_BT, self.attention, scoring)
        else:
            assert inputs.cache_start is not None
            seen = _write(cache, seen, inputs.cache_start)
            allowed_BTS = _allowed(inputs, kind.window)
            attended = reference_attention(
                query, *seen, allowed_BTS, scale=scoring.scale, soft_cap=scoring.soft_cap
            )
        return constrain(
            attended.reshape(*attended.shape[:2], -1), "batch", "length", "heads"
        ), seen


def _project(params: Mapping[str, Array], name: str, x: Array) -> Array:
    # Flat: with batch and time apart, XLA on CPU transposes, element by element, what the gradient
    # of the kernel is made from.
    flat_MD = x.reshape(-1, x.shape[-1])
    y = multiply_kernel(flat_MD, params[f"{name}_kernel"]).reshape(*x.shape[:2], -1)
    bias = params.get(f"{name}_bias")
    return y if bias is None else y + bias[None, None]


_Made = TypeVar("_Made")


def _apply(apply: Callable[[Array], _Made], x_BTD: Array) -> _Made:
    return apply(x_BTD)


def _apply_in_pieces(apply: Callable[[Array], _Made], x_BTD: Array) -> _Made:
    """Applies what sees each token alone; on a CPU to some at a time, the same but for rounding."""
    batch, length, width = x_BTD.shape
    shards = math.gcd(batch, num_shards("batch"))
    held = batch * length // shards
    piece = math.gcd(held, _CPU_TOKENS)
    if piece in (1, held):
        return apply(x_BTD)

    def in_pieces(x_BTD: Array) -> _Made:
        # Where the batch is not cut, its tokens follow each other: nothing is moved.
        pieces_NCSD = x_BTD.reshape(shards, -1, piece, width).swapaxes(0, 1)
        made = jax.lax.map(apply, pieces_NCSD)
        return jax.tree.map(lambda y_NCSO: y_NCSO.swapaxes(0, 1).reshape(batch, length, -1), made)

    return jax.lax.platform_dependent(x_BTD, cpu=in_pieces, default=apply)


def _allowed(inputs: BlockInputs, window: int | None) -> Array:
    """Which places of the cache each query may see in a layer with this window."""
    assert inputs.cache_start is not None
    assert inputs.allowed_BTS is not None
    if window is None:
        return inputs.allowed_BTS
    _, queries, places = inputs.allowed_BTS.shape
    place_1T1 = (inputs.cache_start + jnp.arange(queries))[None, :, None]
    return inputs.allowed_BTS & (place_1T1 - jnp.arange(places)[None, None] < window)
