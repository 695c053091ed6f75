"""How likely a model finds continuations."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from opt_deus_jax.distributed.sharding import named_sharding, num_shards
from opt_deus_jax.errors import UserError
from opt_deus_jax.evaluation.packing import (
    Row,
    Scored,
    batches,
    lay_out,
    pad_rows,
    plan_rows,
)
from opt_deus_jax.evaluation.predictions import score_tokens, states_at
from opt_deus_jax.models.block import root_mean_square_norm
from opt_deus_jax.models.language_model import (
    BlockParams,
    Params,
    apply_block,
    causal_inputs,
    embed,
    segment_kinds,
)
from opt_deus_jax.models.layer_kinds import LayerKind
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.training.placement import put_rows

# Predictions made at once: most, and for the rest of a batch.
_MANY, _FEW = 512, 64
# Targets of one prediction; the choices of a question share the prediction of their first token.
_TARGETS = 8


class Scores(NamedTuple):
    """What `score_continuations` finds.

    Attributes:
        log_likelihoods: float64 [n], nats, summed over the tokens of each continuation.
        is_greedy: bool [n], whether each token is the most likely one.
        truncated: How many were cut from the left to fit the model's context.
    """

    log_likelihoods: np.ndarray
    is_greedy: np.ndarray
    truncated: int


def score_continuations(
    params: Params,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    config: ModelConfig,
    mesh: Mesh,
    dtype: str = "float32",
    batch_tokens: int = 2048,
    on_scored: Callable[[int], Any] = lambda _: None,
) -> Scores:
    """Log-likelihoods of continuations; what contexts have in common is computed once.

    Args:
        params: A param pytree on the mesh.
        pairs: Token ids of context and continuation, neither empty. What exceeds the model's
            context is cut from the left.
        config: The network.
        mesh: The mesh.
        dtype: Type of the activations and of the kernels as multiplied.
        batch_tokens: Tokens a forward pass, over all devices.
        on_scored: Is told how many further continuations are done.

    Returns:
        The scores, in the order of `pairs`.

    Raises:
        UserError: A continuation alone is longer than the model's context.
        ValueError: A context or continuation is empty.
    """
    sequences = [fit(context, answer, config.max_positions) for context, answer in pairs]
    sums, is_greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
    plans = plan_rows([sequence.tokens for sequence in sequences])
    with jax.set_mesh(mesh):
        for batch in batches(plans, batch_tokens, num_shards("batch", mesh)):
            rows = [lay_out(plan.members, sequences) for plan in batch]
            hidden_BTD = _run_rows(params, rows, batch[0].length, config, dtype, mesh)
            for numbers, log_probabilities, hits in _score_rows(
                params, rows, hidden_BTD, config, mesh
            ):
                np.add.at(sums, numbers, log_probabilities)
                np.logical_and.at(is_greedy, numbers, hits)
            on_scored(sum(len(plan.members) for plan in batch))
    truncated = sum(len(a) + len(b) > config.max_positions + 1 for a, b in pairs)
    return Scores(sums, is_greedy, truncated)


def fit(context: Sequence[int], continuation: Sequence[int], max_positions: int) -> Scored:
    """What the network reads and predicts, cut from the left as lm_eval's `hf` backend does.

    Args:
        context: Token ids.
        continuation: Token ids.
        max_positions: The model's context.

    Returns:
        At most `max_positions` tokens; the last token of the continuation is only predicted.

    Raises:
        UserError: The continuation alone is longer than the model's context.
        ValueError: The context or the continuation is empty.
    """
    if not context or not continuation:
        raise ValueError("context and continuation need at least one token each")
    if len(continuation) > max_positions:
        raise UserError(
            f"a continuation of {len(continuation)} tokens is longer than the model's context of "
            f"{max_positions}; leave the question out or take a model with a longer context"
        )
    tokens = (*context, *continuation)[-(max_positions + 1) :]
    return Scored(tokens[:-1], tuple(continuation))


def _run_rows(
    params: Params, rows: Sequence[Row], length: int, config: ModelConfig, dtype: str, mesh: Mesh
) -> Array:
    arrays = pad_rows(rows, length)
    placed = put_rows(arrays, range(len(rows)), len(rows), named_sharding(mesh, "batch"))
    return packed_hidden_states(
        params,
        placed["tokens"],
        placed["positions"],
        placed["ends"],
        config=config,
        dtype=jnp.dtype(dtype),
    )


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def packed_hidden_states(
    params: Params,
    tokens_BT: Int[Array, "b t"],
    positions_BT: Int[Array, "b t"],
    ends_BT: Int[Array, "b t"],
    *,
    config: ModelConfig,
    dtype: jnp.dtype,
) -> Float[Array, "b t d"]:
    """Runs embedding, segments and final norm over rows that are trees.

    Args:
        params: A param pytree.
        tokens_BT: Token ids.
        positions_BT: Position of each token in its sequence.
        ends_BT: Place after the last token that sees this one.
        config: The network; its depth is that of the segments.
        dtype: Type of the activations and of the kernels as multiplied.

    Returns:
        What the head is applied to.
    """
    x_BTD = embed(params, tokens_BT, config=config, dtype=dtype)
    inputs = causal_inputs(config, positions_BT)._replace(ends_BT=ends_BT)

    def apply_pattern(
        kinds: list[LayerKind], x: Array, pattern: list[BlockParams]
    ) -> tuple[Array, None]:
        for kind, block in zip(kinds, pattern, strict=True):
            x, _ = apply_block(config, kind, block, x, inputs)
        return x, None

    all_kinds = segment_kinds(config, params)
    for segment, kinds in zip(params["segments"], all_kinds, strict=True):
        x_BTD, _ = jax.lax.scan(functools.partial(apply_pattern, kinds), x_BTD, segment)
    return root_mean_square_norm(x_BTD, params["final_norm"], config.norm)


def _score_rows(
    params: Params, rows: Sequence[Row], hidden_BTD: Array, config: ModelConfig, mesh: Mesh
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (sequence, log-probability, whether it is the most likely) of predicted tokens."""
    length = hidden_BTD.shape[1]
    entries = _by_place(rows, length)
    head = {name: params[name] for name in ("embedding", "head") if name in params}
    waiting = []
    while entries:
        size = _MANY if len(entries) >= _MANY else _FEW
        size += -size % num_shards("batch", mesh)
        part, entries = entries[:size], entries[size:]
        places_C = np.zeros(size, np.int32)
        targets_CM = np.zeros((size, _TARGETS), np.int32)
        where, numbers = [], []
        for entry, (place, wanted) in enumerate(part):
            places_C[entry] = place
            for column, (target, number) in enumerate(wanted):
                targets_CM[entry, column] = target
                where.append((entry, column))
                numbers.append(number)
        # Apart, so that rows of other lengths need no other program for the tokens.
        hidden_CD = states_at(hidden_BTD, places_C)
        scores = score_tokens(head, hidden_CD, targets_CM, logits=config.logits)
        waiting.append((numbers, where, scores))
    for numbers, where, (log_probabilities_CM, hits_CM) in waiting:
        index = tuple(np.array(where).T)
        yield np.array(numbers), np.asarray(log_probabilities_CM)[index], np.asarray(hits_CM)[index]


def _by_place(rows: Sequence[Row], length: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """The targets of each predicting token, at most `_TARGETS` at a time."""
    wanted: dict[int, list[tuple[int, int]]] = {}
    for row_number, row in enumerate(rows):
        for place, target, number in row.predictions:
            wanted.setdefault(row_number * length + place, []).append((target, number))
    return [
        (place, targets[first : first + _TARGETS])
        for place, targets in wanted.items()
        for first in range(0, len(targets), _TARGETS)
    ]
