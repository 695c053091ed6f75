"""The network as functions over a param pytree.

A param pytree is `{"embedding": [v, d], "final_norm": [d], "head": [v, d] (where untied),
"segments": [segment, ...]}`. A segment is a pattern of blocks repeated r times: a list with one
dict of block parameters per place in the pattern, each leaf stacked to [r, ...].
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opt_deus_jax.distributed.sharding import constrain, gather_width
from opt_deus_jax.models.attention import ATTENDED, cap_softly
from opt_deus_jax.models.block import (
    ROUTER_LOAD,
    BlockInputs,
    DecoderBlock,
    KeyValueCache,
    root_mean_square_norm,
)
from opt_deus_jax.models.layer_kinds import LayerKind
from opt_deus_jax.models.model_config import LogitsConfig, ModelConfig
from opt_deus_jax.models.moe import RouterLoad, no_load
from opt_deus_jax.models.params import outer_specs
from opt_deus_jax.models.products import PRODUCT, multiply
from opt_deus_jax.models.rope import rotary_tables

Params = dict[str, Any]
BlockParams = dict[str, Array]


def init_block(config: ModelConfig, key: Array) -> BlockParams:
    """Draws the parameters of a block like the lowest, float32."""
    x_BTD = jnp.zeros((1, 1, config.width))
    positions = jnp.zeros((1, 1), jnp.int32)
    module = DecoderBlock(config, config.layer_kinds[0])
    variables: Any = module.init(key, x_BTD, causal_inputs(config, positions))
    return variables["params"]


def init_params(config: ModelConfig, key: Array) -> Params:
    """Draws a whole network with one segment, float32.

    Args:
        config: The network.
        key: A jax PRNG key.

    Returns:
        A param pytree.

    Raises:
        ValueError: The layers differ in more than their weights.
    """
    if len(set(config.layer_kinds)) > 1:
        raise ValueError("layers of several kinds do not fit into one stack")
    key_outer, key_blocks = jax.random.split(key)
    params: Params = {}
    for i, (name, spec) in enumerate(outer_specs(config).items()):
        if spec.init != "normal":
            params[name] = jnp.full(spec.shape, float(spec.init == "ones"))
        else:
            drawn = jax.random.normal(jax.random.fold_in(key_outer, i), spec.shape)
            params[name] = drawn * config.initializer_range
    keys = jax.random.split(key_blocks, config.num_layers)
    params["segments"] = [[jax.vmap(lambda k: init_block(config, k))(keys)]]
    return params


def causal_inputs(
    config: ModelConfig, positions_BT: Int[Array, "b t"], example_BT: Array | None = None
) -> BlockInputs:
    """The inputs of a full causal forward pass without a cache."""
    tables = (rotary_tables(rope, config.head_dim, positions_BT) for rope in config.ropes)
    return BlockInputs(tuple(tables), positions_BT, example_BT)


def segment_kinds(config: ModelConfig, params: Params) -> list[list[LayerKind]]:
    """The kind of every block of the patterns of a param pytree.

    Args:
        config: The network.
        params: A param pytree.

    Returns:
        For each segment, a kind for each place in its pattern.

    Raises:
        ValueError: Layers of different kinds are stacked, or the depth is another one.
    """
    repeats = [len(next(iter(segment[0].values()))) for segment in params["segments"]]
    lengths = [len(segment) for segment in params["segments"]]
    kinds = config.kinds_of(sum(r * n for r, n in zip(repeats, lengths, strict=True)))
    found, first = [], 0
    for count, length in zip(repeats, lengths, strict=True):
        pattern = kinds[first : first + length]
        if kinds[first : first + count * length] != pattern * count:
            raise ValueError(f"the segment at depth {first} stacks layers of different kinds")
        found.append(list(pattern))
        first += count * length
    return found


def positions_within(example_BT: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Position of each token in its example.

    Args:
        example_BT: Number of the example that each token belongs to; an example is a run.

    Returns:
        int32, from 0 at the first token of each run.
    """
    places_BT = jnp.broadcast_to(jnp.arange(example_BT.shape[1])[None], example_BT.shape)
    is_first_BT = jnp.diff(example_BT, axis=1, prepend=-1) != 0
    return places_BT - jax.lax.cummax(jnp.where(is_first_BT, places_BT, 0), axis=1)


def embed(
    params: Params, tokens_BT: Int[Array, "b t"], *, config: ModelConfig, dtype: jnp.dtype
) -> Float[Array, "b t d"]:
    """What the lowest block is given for some tokens."""
    # Each device looks up its part of the width for all sequences of its data group.
    tokens_BT = constrain(tokens_BT, "lookup_batch", "length")
    x_BTD = constrain(
        params["embedding"][tokens_BT].astype(dtype), "lookup_batch", "length", "width"
    )
    if config.embedding_multiplier != 1:
        x_BTD = x_BTD * jnp.asarray(config.embedding_multiplier, dtype)
    return constrain(x_BTD, "batch", "length", "gathered_width")


def apply_block(
    config: ModelConfig,
    kind: LayerKind,
    block: BlockParams,
    x_BTD: Float[Array, "b t d"],
    inputs: BlockInputs,
    cache: KeyValueCache | None = None,
    attention: str = "reference",
    kernel_dtype: jnp.dtype | None = None,
    experts: str = "dense",
) -> tuple[Float[Array, "b t d"], KeyValueCache]:
    """Applies one `DecoderBlock` with the given parameters."""
    module = DecoderBlock(config, kind, attention, kernel_dtype, experts)
    return module.apply({"params": block}, x_BTD, inputs, cache)  # pyright: ignore


def _all_but_casts(primitive: Any, *_: Any, **__: Any) -> bool:
    # A parameter that was cast or gathered would be stored a second time, for every block.
    return primitive.name not in ("convert_element_type", "custom_vjp_call", "sharding_constraint")


# What the backward pass finds stored; the rest it computes again.
_REMAT_POLICIES = {
    "none": _all_but_casts,
    "matmuls": jax.checkpoint_policies.save_only_these_names(ATTENDED, PRODUCT),
    "block": jax.checkpoint_policies.nothing_saveable,
}


# The residual stream and what experts were given so far, where that is wanted.
_State = tuple[Array, RouterLoad | None]


def hidden_states(
    params: Params,
    tokens_BT: Int[Array, "b t"],
    example_BT: Int[Array, "b t"] | None = None,
    *,
    config: ModelConfig,
    dtype: jnp.dtype,
    attention: str = "reference",
    remat: str = "none",
    kernel_dtype: jnp.dtype | None = None,
    experts: str = "dense",
) -> Float[Array, "b t d"]:
    """Runs embedding, segments and final norm.

    Args:
        params: A param pytree.
        tokens_BT: Token ids.
        example_BT: Which example each token belongs to: tokens attend within it and positions
            begin again with it; None takes each row as one example.
        config: The network; its depth is that of the segments.
        dtype: Type of the activations.
        attention: An implementation of `causal_attention`.
        remat: For the backward pass `none` stores every activation, `matmuls` only the products
            with kernels, `block` nothing within a block.
        kernel_dtype: Type of the kernels as multiplied (`products.project`); None takes `dtype`.
        experts: An implementation of `moe.apply_experts`.

    Returns:
        What the head is applied to.
    """
    return hidden_states_and_load(
        params,
        tokens_BT,
        example_BT,
        config=config,
        dtype=dtype,
        attention=attention,
        remat=remat,
        kernel_dtype=kernel_dtype,
        experts=experts,
        wants_load=False,
    )[0]


def hidden_states_and_load(
    params: Params,
    tokens_BT: Int[Array, "b t"],
    example_BT: Int[Array, "b t"] | None,
    *,
    config: ModelConfig,
    dtype: jnp.dtype,
    attention: str,
    remat: str,
    kernel_dtype: jnp.dtype | None,
    experts: str,
    wants_load: bool,
) -> tuple[Float[Array, "b t d"], RouterLoad | None]:
    """Runs what `hidden_states` does, and sums up which experts were chosen.

    The arguments are those of `hidden_states`. `wants_load` says whether the load is to be summed;
    the network then has experts. Tokens of example 0 are not counted.

    Returns:
        What the head is applied to; the load of all layers, or None.
    """
    if example_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    else:
        positions_BT = positions_within(example_BT)
    inputs = causal_inputs(config, positions_BT, example_BT)
    choices = (attention, kernel_dtype, experts)

    # A block at a time: a pattern as a whole would also repeat the products between its blocks.
    @functools.partial(
        jax.checkpoint, prevent_cse=False, policy=_REMAT_POLICIES[remat], static_argnums=0
    )
    def apply(kind: LayerKind, state: _State, block: BlockParams) -> _State:
        x, load = state
        if load is None or not kind.has_experts:
            x, _ = apply_block(config, kind, block, x, inputs, None, *choices)
            return x, load
        module = DecoderBlock(config, kind, *choices)
        variables: Any = {"params": block}
        (x, _), sown = module.apply(variables, x, inputs, mutable=[ROUTER_LOAD])  # pyright: ignore
        (added,) = sown[ROUTER_LOAD]["load"]
        return x, jax.tree.map(jnp.add, load, added)

    def apply_pattern(
        kinds: list[LayerKind], state: _State, pattern: list[BlockParams]
    ) -> tuple[_State, None]:
        for kind, block in zip(kinds, pattern, strict=True):
            state = apply(kind, state, block)
        return state, None

    x_BTD = embed(params, tokens_BT, config=config, dtype=dtype)
    state = (x_BTD, no_load(config.experts) if wants_load and config.experts else None)
    all_kinds = segment_kinds(config, params)
    for segment, kinds in zip(params["segments"], all_kinds, strict=True):
        state, _ = jax.lax.scan(functools.partial(apply_pattern, kinds), state, segment)
    x_BTD, load = state
    return root_mean_square_norm(x_BTD, params["final_norm"], config.norm), load


def head_kernel(params: Params, dtype: jnp.dtype) -> Float[Array, "v d"]:
    """The output kernel, the embedding where they are tied, as it is multiplied with."""
    kernel = params.get("head", params["embedding"])
    return gather_width(kernel.astype(dtype), ("vocabulary", "width"))


def project_to_vocabulary(
    hidden: Float[Array, "*b d"], head_VD: Float[Array, "v d"], logits: LogitsConfig
) -> Float[Array, "*b v"]:
    """Logits in float32; the hidden states are rounded to the type of the head."""
    products = multiply("...d,vd->...v", hidden, head_VD, jnp.dtype("float32"))
    if logits.divisor != 1:
        products = products / logits.divisor
    return cap_softly(products, logits.soft_cap)


def logits(
    params: Params, tokens_BT: Int[Array, "b t"], *, config: ModelConfig, dtype: jnp.dtype
) -> Float[Array, "b t v"]:
    """Logits of every position, float32; for short inputs, since they are all in memory."""
    hidden = hidden_states(params, tokens_BT, config=config, dtype=dtype)
    return project_to_vocabulary(hidden, head_kernel(params, dtype), config.logits)


def cached_forward(
    params: Params,
    tokens_BT: Int[Array, "b t"],
    positions_BT: Int[Array, "b t"],
    allowed_BTS: Bool[Array, "b t s"],
    cache: list[list[KeyValueCache]],
    cache_start: Array,
    *,
    config: ModelConfig,
    dtype: jnp.dtype,
) -> tuple[Float[Array, "b v"], list[list[KeyValueCache]]]:
    """Runs new tokens against the keys and values of earlier ones.

    Args:
        params: A param pytree.
        tokens_BT: The new tokens.
        positions_BT: Their positions.
        allowed_BTS: Which places of the cache each may see, its own included.
        cache: From `empty_cache` or an earlier call.
        cache_start: Place in the cache of the first new token, int32 scalar.
        config: The network.
        dtype: Type of the activations.

    Returns:
        Logits of the last token, and the cache with the new tokens in it.
    """
    inputs = causal_inputs(config, positions_BT)._replace(
        allowed_BTS=allowed_BTS, cache_start=cache_start
    )
    x_BTD = embed(params, tokens_BT, config=config, dtype=dtype)

    def apply_pattern(
        kinds: list[LayerKind], x: Array, stacked: tuple[Any, Any]
    ) -> tuple[Array, list[KeyValueCache]]:
        updated = []
        for kind, block, block_cache in zip(kinds, *stacked, strict=True):
            x, block_cache = apply_block(config, kind, block, x, inputs, block_cache)
            updated.append(block_cache)
        return x, updated

    updated_cache = []
    all_kinds = segment_kinds(config, params)
    for kinds, segment, segment_cache in zip(all_kinds, params["segments"], cache, strict=True):
        step = functools.partial(apply_pattern, kinds)
        x_BTD, segment_cache = jax.lax.scan(step, x_BTD, (segment, segment_cache))
        updated_cache.append(segment_cache)
    last_BD = root_mean_square_norm(x_BTD[:, -1], params["final_norm"], config.norm)
    return project_to_vocabulary(last_BD, head_kernel(params, dtype), config.logits), updated_cache


def empty_cache(
    params: Params, batch: int, length: int, *, config: ModelConfig, dtype: jnp.dtype
) -> list[list[KeyValueCache]]:
    """Room for `length` tokens in every block, stacked like the segments."""
    shape = (batch, length, config.num_kv_heads, config.head_dim)

    def of_block(block: BlockParams) -> KeyValueCache:
        zeros = jnp.zeros((block["query_kernel"].shape[0], *shape), dtype)
        return KeyValueCache(zeros, zeros)

    return [[of_block(block) for block in segment] for segment in params["segments"]]
