"""New layers whose values and neurons are of one size on calibration text.

What value and up compute is only seen through output and down, which start at zero: scaled or
turned, the network computes the same, but AdamW's steps, of a size of their own, move it otherwise.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.models.block import ACTIVATIONS, root_mean_square_norm
from opt_deus_jax.models.language_model import apply_block, causal_inputs, embed
from opt_deus_jax.models.model_config import ModelConfig, read_model_config
from opt_deus_jax.models.params import outer_specs
from opt_deus_jax.upscaling.base_tensors import parent_block
from opt_deus_jax.upscaling.features import check_parameters
from opt_deus_jax.upscaling.new_block import Block

FIELD = "config field upscale.balance='activations'"
# Directions of a head's values that are this much smaller than the largest are left as small.
_FLOOR = 1e-4


class Moments(NamedTuple):
    """Second moments of what a block's output and down kernels weigh.

    Attributes:
        value_KHH: Of the values of each KV head, before attention mixes them.
        neuron_N: Mean square of each neuron of the MLP.
    """

    value_KHH: np.ndarray
    neuron_N: np.ndarray


@jax.jit
def _second(x_BTF: jax.Array) -> jax.Array:
    flat_MF = x_BTF.reshape(-1, x_BTF.shape[-1])
    return flat_MF.T @ flat_MF / flat_MF.shape[0]


def base_moments(source: CheckpointSource, tokens_BT: Int[np.ndarray, "b t"]) -> list[Moments]:
    """Runs the base on text and measures every layer.

    Args:
        source: The base.
        tokens_BT: Token ids.

    Returns:
        For each layer.

    Raises:
        UserError: The blocks have parameters that are not known here.
    """
    config = read_model_config(source.hf_config, source.name)
    outer = outer_specs(config)
    table = {"embedding": jnp.asarray(source.read(outer["embedding"].hf_name).astype(np.float32))}
    x_BTD = embed(table, jnp.asarray(tokens_BT), config=config, dtype=jnp.dtype("float32"))
    one = dataclasses.replace(config, layer_kinds=())
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    inputs = causal_inputs(one, positions_BT)
    moments = []
    for layer, kind in enumerate(config.layer_kinds):
        stored = parent_block(source.read, config, layer)
        check_parameters(stored, FIELD)
        block = {name: jnp.asarray(array) for name, array in stored.items()}
        normed = root_mean_square_norm(x_BTD, block["input_norm"], config.norm)
        values_BTKH = (normed @ block["value_kernel"].T).reshape(
            *tokens_BT.shape, config.num_kv_heads, config.head_dim
        )
        # The residual stream behind attention: the block without its MLP.
        half = block | {"down_kernel": jnp.zeros_like(block["down_kernel"])}
        attended = apply_block(one, kind, half, x_BTD, inputs)[0]
        normed = root_mean_square_norm(attended, block["post_attention_norm"], config.norm)
        gate = ACTIVATIONS[config.activation](normed @ block["gate_kernel"].T)
        neurons = gate * (normed @ block["up_kernel"].T)
        value_KHH = np.stack(
            [_second(values_BTKH[:, :, head]) for head in range(config.num_kv_heads)]
        )
        moments.append(Moments(value_KHH, np.asarray(jnp.mean(neurons**2, axis=(0, 1)))))
        x_BTD = apply_block(one, kind, block, x_BTD, inputs)[0]
    return moments


def whiten_branches(block: Block, moments: Moments, config: ModelConfig) -> dict[str, np.ndarray]:
    """Gives the values of a KV head the covariance 1, and every neuron the mean square 1.

    Args:
        block: float32 arrays by the names of `block_specs`, output and down kernels zero.
        moments: Of the layer that it copies.
        config: The network.

    Returns:
        The same function, the identity.

    Raises:
        ValueError: Output or down is not zero, or there are biases.
    """
    if block["output_kernel"].any() or block["down_kernel"].any() or "up_bias" in block:
        raise ValueError("only a block without biases whose output and down are zero is whitened")
    heads_KHD = block["value_kernel"].reshape(config.num_kv_heads, config.head_dim, -1)
    power_KH, turn_KHH = np.linalg.eigh(moments.value_KHH.astype(np.float64))
    power_KH = np.maximum(power_KH, _FLOOR * power_KH.max(axis=1, keepdims=True))
    # Symmetric, so that directions stay as near as they can to what they were.
    whiten_KHH = np.einsum("khi,ki,kji->khj", turn_KHH, power_KH**-0.5, turn_KHH)
    size_N = np.sqrt(np.maximum(moments.neuron_N, np.finfo(np.float32).tiny))
    return dict(block) | {
        "value_kernel": (whiten_KHH @ heads_KHD).reshape(block["value_kernel"].shape).astype("f4"),
        "up_kernel": block["up_kernel"] / size_N[:, None],
    }
