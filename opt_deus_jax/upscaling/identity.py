"""Proves that a grown model computes what its base computes."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from scipy import special

from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.block import BlockInputs, root_mean_square_norm
from opt_deus_jax.models.language_model import (
    apply_block,
    causal_inputs,
    embed,
    project_to_vocabulary,
)
from opt_deus_jax.models.layer_kinds import LayerKind
from opt_deus_jax.models.model_config import ModelConfig, read_model_config
from opt_deus_jax.models.params import outer_specs
from opt_deus_jax.upscaling.base_tensors import parent_block

# Of the vocabulary: with a width of 4096 they take 0.3 GB in float32, all 128256 of Llama 3 2.1 GB.
_ROWS_AT_ONCE = 16_384


@dataclasses.dataclass(frozen=True)
class IdentityReport:
    """How far a grown model is from its base on some tokens.

    Attributes:
        bit_identical: Whether all logits are the same float32 numbers, bit for bit; also where
            every token is sent to all experts.
        tokens: How many tokens were compared.
        max_difference: Largest absolute difference of a logit.
        mean_divergence: Mean Kullback-Leibler divergence of the grown model's next-token
            distribution from the base's, nats.
    """

    bit_identical: bool
    tokens: int
    max_difference: float
    mean_divergence: float


@functools.partial(jax.jit, static_argnames=("config", "kind"))
def _step(
    config: ModelConfig,
    kind: LayerKind,
    block: dict[str, Array],
    x_BTD: Array,
    inputs: BlockInputs,
) -> Array:
    return apply_block(config, kind, block, x_BTD, inputs)[0]


@functools.partial(jax.jit, static_argnames="config")
def _normed(config: ModelConfig, x_BTD: Array, scale_D: Array) -> Array:
    return root_mean_square_norm(x_BTD, scale_D, config.norm)


@functools.partial(jax.jit, static_argnames="config")
def _logits(config: ModelConfig, hidden_BTD: Array, head_VD: Array) -> Array:
    return project_to_vocabulary(hidden_BTD, head_VD, config.logits)


def _row_parts(source: CheckpointSource, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """A kernel as parts of its rows, with the first of each; whole where it can only be read so."""
    rows = source.tensors[name].shape[0]
    whole = source.read(name) if source.read_slice is None else None
    for first in range(0, rows, _ROWS_AT_ONCE):
        part = slice(first, min(first + _ROWS_AT_ONCE, rows))
        yield first, source.read_part(name, (part, slice(None))) if whole is None else whole[part]


def _embedded(
    source: CheckpointSource, name: str, tokens_BT: np.ndarray, config: ModelConfig
) -> Array:
    """What the lowest block is given; of the embedding only the rows of the tokens are kept."""
    unique, index = np.unique(tokens_BT, return_inverse=True)
    rows = [
        part[unique[(first <= unique) & (unique < first + len(part))] - first]
        for first, part in _row_parts(source, name)
    ]
    params = {"embedding": jnp.asarray(np.concatenate(rows).astype(np.float32))}
    index_BT = jnp.asarray(index.reshape(tokens_BT.shape).astype(np.int32))
    return embed(params, index_BT, config=config, dtype=jnp.dtype("float32"))


def streamed_logits(
    source: CheckpointSource, tokens_BT: Int[np.ndarray, "b t"], *, to_all_experts: bool = False
) -> np.ndarray:
    """Logits of a checkpoint with one block, or a part of the vocabulary, in memory at a time.

    One block of each kind is compiled and applied layer by layer, so two checkpoints of the same
    shape go through the same machine code.

    Args:
        source: The checkpoint.
        tokens_BT: Token ids.
        to_all_experts: Whether every token is sent to all experts, if there are any, instead of as
            many as the config says.

    Returns:
        float32 [b, t, v].
    """
    config = read_model_config(source.hf_config, source.name)
    if to_all_experts and config.experts is not None:
        experts = dataclasses.replace(config.experts, per_token=config.experts.number)
        config = dataclasses.replace(config, experts=experts)
    outer = outer_specs(config)

    def load(hf_name: str) -> Array:
        return jnp.asarray(source.read(hf_name).astype(np.float32))

    # Depth is not part of the block's computation; leaving it in would compile a block per depth.
    whole, config = config, dataclasses.replace(config, layer_kinds=())
    x_BTD = _embedded(source, outer["embedding"].hf_name, tokens_BT, config)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    inputs = causal_inputs(config, positions_BT)
    for layer, kind in enumerate(whole.layer_kinds):
        block = {k: jnp.asarray(v) for k, v in parent_block(source.read, whole, layer).items()}
        x_BTD = _step(config, kind, block, x_BTD, inputs).block_until_ready()
        # Or the next one would be read beside it.
        del block
    hidden_BTD = _normed(config, x_BTD, load(outer["final_norm"].hf_name))
    logits_BTV = np.empty((*tokens_BT.shape, config.vocabulary_size), np.float32)
    head = outer.get("head", outer["embedding"]).hf_name
    for first, part in _row_parts(source, head):
        head_VD = jnp.asarray(part.astype(np.float32))
        logits_BTV[..., first : first + len(part)] = _logits(config, hidden_BTD, head_VD)
    return logits_BTV


def compare_to_base(
    base: CheckpointSource, grown: CheckpointSource, tokens_BT: Int[np.ndarray, "b t"]
) -> IdentityReport:
    """Runs both models on the same tokens in float32.

    Args:
        base: The base.
        grown: The grown model.
        tokens_BT: Token ids.

    Returns:
        How far they are apart.

    Raises:
        UserError: A logit of either model is not finite.
    """
    base_BTV = streamed_logits(base, tokens_BT)
    grown_BTV = streamed_logits(grown, tokens_BT)
    for source, values in ((base, base_BTV), (grown, grown_BTV)):
        if not np.isfinite(values).all():
            raise UserError(f"{source.name}: its logits are not finite; the weights are damaged")
    width = base_BTV.shape[-1]
    difference, divergences = 0.0, []
    # In float64 the logits of all tokens would be as large as a block.
    for base_V, grown_V in zip(
        base_BTV.reshape(-1, width), grown_BTV.reshape(-1, width), strict=True
    ):
        difference = max(difference, float(np.abs(base_V - grown_V).max()))
        log_base, log_grown = (
            special.log_softmax(logits_V.astype(np.float64)) for logits_V in (base_V, grown_V)
        )
        divergences.append(np.sum(np.exp(log_base) * (log_base - log_grown)))
    is_identical = base_BTV.tobytes() == grown_BTV.tobytes()
    if is_identical and read_model_config(base.hf_config, base.name).experts is not None:
        # The probe may leave out experts that other text is sent to.
        of_all = (streamed_logits(s, tokens_BT, to_all_experts=True) for s in (base, grown))
        is_identical = next(of_all).tobytes() == next(of_all).tobytes()
    return IdentityReport(
        bit_identical=is_identical,
        tokens=int(tokens_BT.size),
        max_difference=difference,
        mean_divergence=float(np.mean(divergences)),
    )
