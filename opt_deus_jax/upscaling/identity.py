"""Proves that a grown model computes what its base computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

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
from opt_deus_jax.models.params import block_specs, outer_specs


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
def _logits(config: ModelConfig, x_BTD: Array, scale_D: Array, head_VD: Array) -> Array:
    hidden_BTD = root_mean_square_norm(x_BTD, scale_D, config.norm)
    return project_to_vocabulary(hidden_BTD, head_VD, config.logits)


def streamed_logits(
    source: CheckpointSource, tokens_BT: Int[np.ndarray, "b t"], *, to_all_experts: bool = False
) -> np.ndarray:
    """Logits of a checkpoint with one block in memory at a time.

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
    # Depth is not part of the block's computation; leaving it in would compile a block per depth.
    kinds, config = config.layer_kinds, dataclasses.replace(config, layer_kinds=())
    if to_all_experts and config.experts is not None:
        experts = dataclasses.replace(config.experts, per_token=config.experts.number)
        config = dataclasses.replace(config, experts=experts)
    outer = outer_specs(config)

    def load(hf_name: str) -> Array:
        return jnp.asarray(source.read(hf_name).astype(np.float32))

    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    inputs = causal_inputs(config, jnp.asarray(positions_BT))
    embedding_VD = load(outer["embedding"].hf_name)
    outer_params, dtype = {"embedding": embedding_VD}, jnp.dtype("float32")
    x_BTD = embed(outer_params, jnp.asarray(tokens_BT), config=config, dtype=dtype)
    del outer_params
    if "head" in outer:
        del embedding_VD
    for layer, kind in enumerate(kinds):
        block = {
            name: load(spec.hf_name.format(layer=layer))
            for name, spec in block_specs(config, kind).items()
        }
        x_BTD = _step(config, kind, block, x_BTD, inputs)
    head_VD = load(outer["head"].hf_name) if "head" in outer else embedding_VD  # pyright: ignore
    scale_D = load(outer["final_norm"].hf_name)
    return np.asarray(_logits(config, x_BTD, scale_D, head_VD))


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
    log_base = np.asarray(jax.nn.log_softmax(jnp.asarray(base_BTV)), np.float64)
    log_grown = np.asarray(jax.nn.log_softmax(jnp.asarray(grown_BTV)), np.float64)
    divergence = np.sum(np.exp(log_base) * (log_base - log_grown), axis=-1).mean()
    is_identical = base_BTV.tobytes() == grown_BTV.tobytes()
    if is_identical and read_model_config(base.hf_config, base.name).experts is not None:
        # The probe may leave out experts that other text is sent to.
        of_all = (streamed_logits(s, tokens_BT, to_all_experts=True) for s in (base, grown))
        is_identical = next(of_all).tobytes() == next(of_all).tobytes()
    return IdentityReport(
        bit_identical=is_identical,
        tokens=int(tokens_BT.size),
        max_difference=float(np.abs(base_BTV - grown_BTV).max()),
        mean_divergence=float(divergence),
    )
