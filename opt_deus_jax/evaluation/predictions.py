"""How likely tokens are, without all logits in memory."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from opt_deus_jax.distributed.sharding import constrain, num_shards
from opt_deus_jax.models.language_model import head_kernel, project_to_vocabulary
from opt_deus_jax.models.model_config import LogitsConfig

# Logits of so many tokens of the vocabulary are made at once, on each device: all would leave the
# cache of a CPU, which then takes as long to add them up as to make them.
_BLOCK = 2048


class _Seen(NamedTuple):
    """What is known of predictions, of the tokens of the vocabulary that were looked at."""

    highest_C: Array
    # The sum of exp(logit - highest).
    mass_C: Array
    # The first token with the highest logit.
    best_C: Array
    target_CM: Array


@jax.jit
def states_at(hidden_BTD: Float[Array, "b t d"], places_C: Int[Array, " c"]) -> Float[Array, "c d"]:
    """Hidden states at places among the b * t, spread over the devices as rows are."""
    hidden_CD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[places_C]
    return constrain(hidden_CD, "batch", "gathered_width")


@functools.partial(jax.jit, static_argnames="logits")
def score_tokens(
    head: dict[str, Any],
    hidden_CD: Float[Array, "c d"],
    targets_CM: Int[Array, "c m"],
    *,
    logits: LogitsConfig,
) -> tuple[Float[Array, "c m"], Bool[Array, "c m"]]:
    """Log-probabilities of tokens, and whether each is the most likely one.

    Args:
        head: "embedding" and, where it is another, "head" of the params.
        hidden_CD: What the head is applied to, of each prediction.
        targets_CM: Tokens whose probability is asked for, of each prediction.
        logits: What is done to the products with the head.

    Returns:
        float32, in nats, and the same answers as `jnp.argmax` of all logits; on every device.
    """
    shards = num_shards("vocabulary")
    head_SHD = head_kernel(head, hidden_CD.dtype).reshape(shards, -1, hidden_CD.shape[-1])
    head_SHD = constrain(head_SHD, "vocabulary", "all_rows", "gathered_width")
    held = head_SHD.shape[1]
    largest = min(_BLOCK, held)

    def look_at(size: int, block: Array | int, seen: _Seen) -> _Seen:
        first = block * largest
        head_VD = jax.lax.dynamic_slice_in_dim(head_SHD, first, size, axis=1)
        logits_CV = project_to_vocabulary(hidden_CD, head_VD.reshape(-1, head_VD.shape[-1]), logits)
        logits_CV = constrain(logits_CV, "batch", "vocabulary")
        tokens_SV = jnp.arange(shards)[:, None] * held + first + jnp.arange(size)[None]
        offset_CM = targets_CM % held - first
        column_CM = targets_CM // held * size + jnp.clip(offset_CM, 0, size - 1)
        found_CM = jnp.take_along_axis(logits_CV, column_CM, axis=-1)
        is_found_CM = (offset_CM >= 0) & (offset_CM < size)
        target_CM = jnp.where(is_found_CM, found_CM, seen.target_CM)
        return _look_at(seen, logits_CV, tokens_SV.reshape(1, -1), target_CM)

    zeros_C = jnp.zeros(len(hidden_CD))
    seen = _Seen(
        zeros_C - jnp.inf, zeros_C, zeros_C.astype(jnp.int32) - 1, jnp.zeros(targets_CM.shape)
    )
    whole, rest = divmod(held, largest)
    seen = jax.lax.fori_loop(0, whole, functools.partial(look_at, largest), seen)
    if rest:
        seen = look_at(rest, whole, seen)
    normalizer_C = jnp.log(seen.mass_C) + seen.highest_C
    # Every process reads all of the result.
    replicate = functools.partial(jax.lax.with_sharding_constraint, shardings=PartitionSpec())
    log_probabilities_CM = seen.target_CM - normalizer_C[:, None]
    return replicate(log_probabilities_CM), replicate(targets_CM == seen.best_C[:, None])


def _look_at(seen: _Seen, logits_CV: Array, tokens_1V: Array, target_CM: Array) -> _Seen:
    largest_C = jnp.max(logits_CV, axis=-1)
    # The first of the largest: what `jnp.argmax` finds, in two passes that CPUs vectorise.
    is_largest_CV = logits_CV == largest_C[:, None]
    first_C = jnp.min(jnp.where(is_largest_CV, tokens_1V, jnp.iinfo(jnp.int32).max), axis=-1)
    best_C = jnp.where(largest_C > seen.highest_C, first_C, seen.best_C)
    # Devices look at distant parts of the vocabulary at once.
    is_tie_C = largest_C == seen.highest_C
    best_C = jnp.where(is_tie_C, jnp.minimum(first_C, seen.best_C), best_C)
    highest_C = jnp.maximum(seen.highest_C, largest_C)
    mass_C = seen.mass_C * jnp.exp(seen.highest_C - highest_C)
    mass_C = mass_C + jnp.sum(jnp.exp(logits_CV - highest_C[:, None]), axis=-1)
    return _Seen(highest_C, mass_C, best_C, target_CM)
