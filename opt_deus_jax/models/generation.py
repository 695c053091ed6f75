"""Sampling text with a key-value cache."""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from opt_deus_jax.distributed.sharding import constrain
from opt_deus_jax.models.language_model import Params, cached_forward, empty_cache
from opt_deus_jax.models.model_config import ModelConfig


def sample_token(
    logits_BV: Float[Array, "b v"], key: Array, *, temperature: float, top_p: float
) -> Int[Array, " b"]:
    """Picks the next token of each row.

    Args:
        logits_BV: Logits.
        key: A jax PRNG key.
        temperature: 0 takes the most likely token.
        top_p: Only the most likely tokens that together reach this probability are drawn from.

    Returns:
        Token ids, int32.
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / temperature
    if top_p < 1:
        ordered_BV = -jnp.sort(-logits_BV, axis=-1)
        before_BV = jnp.cumsum(jax.nn.softmax(ordered_BV, axis=-1), axis=-1)
        # A token is kept while the mass before it is below top_p, so the first always is.
        kept_BV = jnp.concatenate([jnp.zeros_like(before_BV[:, :1]), before_BV[:, :-1]], 1) < top_p
        floor_B1 = jnp.min(jnp.where(kept_BV, ordered_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)


@functools.partial(
    jax.jit,
    static_argnames=("config", "dtype", "max_new_tokens", "temperature", "top_p"),
)
def _generate(
    params: Params,
    tokens_BT: Array,
    real_BT: Array,
    key: Array,
    *,
    config: ModelConfig,
    dtype: jnp.dtype,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> Array:
    batch, length = tokens_BT.shape
    total = length + max_new_tokens
    places_S = jnp.arange(total)
    real_BS = jnp.pad(real_BT, ((0, 0), (0, max_new_tokens)), constant_values=True)
    positions_BT = jnp.maximum(jnp.cumsum(real_BT, axis=1) - 1, 0)
    causal_TS = places_S[None] <= jnp.arange(length)[:, None]
    # A padded query sees only itself: its output is never used, but it must not be NaN.
    itself_TS = places_S[None] == jnp.arange(length)[:, None]
    allowed_BTS = (causal_TS[None] & real_BS[:, None]) | itself_TS[None]
    cache = empty_cache(params, batch, total, config=config, dtype=dtype)
    forward = functools.partial(cached_forward, config=config, dtype=dtype)
    logits_BV, cache = forward(
        params, tokens_BT, positions_BT, allowed_BTS, cache, jnp.zeros((), jnp.int32)
    )

    def step(state: tuple, i: Array) -> tuple[tuple, Array]:
        logits_BV, cache, position_B = state
        token_B = sample_token(
            logits_BV, jax.random.fold_in(key, i), temperature=temperature, top_p=top_p
        )
        allowed_B1S = (real_BS & (places_S <= length + i)[None])[:, None]
        logits_BV, cache = forward(
            params, token_B[:, None], position_B[:, None], allowed_B1S, cache, length + i
        )
        return (logits_BV, cache, position_B + 1), token_B

    state = (logits_BV, cache, positions_BT[:, -1] + 1)
    _, generated_NB = jax.lax.scan(step, state, jnp.arange(max_new_tokens, dtype=jnp.int32))
    # Every process reads all of the result.
    return constrain(generated_NB.T, "all_rows", "length")


def generate(
    params: Params,
    prompts: list[list[int]],
    *,
    config: ModelConfig,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: str = "float32",
) -> list[list[int]]:
    """Continues a batch of prompts of any lengths.

    Args:
        params: A param pytree.
        prompts: Token ids of each prompt, none empty.
        config: The network.
        max_new_tokens: How many tokens to add at most.
        eos_ids: A row ends before the first of these tokens.
        temperature: 0 is greedy.
        top_p: Nucleus sampling.
        seed: Seed of the draws.
        dtype: Type of the activations and of the cache.

    Returns:
        The new tokens of each prompt, without the one that ended it.

    Raises:
        ValueError: A prompt is empty.
    """
    if not all(prompts):
        raise ValueError("a prompt is empty: give at least one token")
    length = max(len(prompt) for prompt in prompts)
    tokens_BT = np.zeros((len(prompts), length), np.int32)
    real_BT = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, length - len(prompt) :] = prompt
        real_BT[row, length - len(prompt) :] = True
    generated = _generate(
        params,
        jnp.asarray(tokens_BT),
        jnp.asarray(real_BT),
        jax.random.key(seed),
        config=config,
        dtype=jnp.dtype(dtype),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
    )
    rows = np.asarray(generated).tolist()
    return [list(itertools.takewhile(lambda token: token not in eos_ids, row)) for row in rows]
