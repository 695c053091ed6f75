"""Neurons in pairs whose outputs cancel: an identity in which no kernel of the MLP is zero."""

import numpy as np

from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.upscaling.blending import importance
from opt_deus_jax.upscaling.features import (
    NEURON_MATRICES,
    check_parameters,
    fold_features,
    shift_norms,
)
from opt_deus_jax.upscaling.new_block import Block


def twin_block(next_: Block, config: ModelConfig) -> dict[str, np.ndarray]:
    """Takes the better half of B's neurons twice, with opposite down columns.

    With a down kernel of zeros the first step reaches down alone, since what gate and up are told
    goes through it. Here the sum of each pair is zero, but gate, up and down all get gradients at
    once, and opposite ones, so that the two of a pair part. Net2Net and its heirs do the like to
    widen a layer (Chen et al. 2016, arXiv 1511.05641).

    Args:
        next_: Parent B, float32 arrays by the names of `block_specs`.
        config: The network.

    Returns:
        The new block. Its attention is B's with a zeroed output; it computes the identity up to
        the rounding of sums in which every term has its opposite.

    Raises:
        UserError: The block has parameters that are not known here.
    """
    check_parameters(next_, "config field upscale.method='twin'")
    pairs = config.mlp_width // 2
    neurons = fold_features(shift_norms(next_, config.norm.offset), NEURON_MATRICES)
    rank = np.argsort(-importance(neurons, config.mlp_width), kind="stable")
    half = np.sort(rank[:pairs])
    # An odd neuron out stands alone, with a column of zeros.
    chosen = np.concatenate([half, half, rank[pairs : pairs + config.mlp_width % 2]])
    sign = np.repeat(np.array([1, -1, 0], np.float32), [pairs, pairs, len(chosen) - 2 * pairs])
    block = dict(next_)
    for name in ("gate_kernel", "up_kernel", "gate_bias", "up_bias"):
        if name in block:
            block[name] = block[name][chosen]
    block["down_kernel"] = block["down_kernel"][:, chosen] * sign
    for name in ("output_kernel", "output_bias", "down_bias"):
        if name in block:
            block[name] = np.zeros_like(block[name])
    return block
