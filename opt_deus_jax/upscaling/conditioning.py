"""The same function in other coordinates, in which an optimizer takes other steps.

What value and up compute is only ever seen through output and down. Where those are zero, or are
changed to match, value and up may be scaled or turned at will. The network computes the same, but
AdamW, whose steps have a size of their own, moves it differently.
"""

import numpy as np

from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.upscaling.blending import restore_rows
from opt_deus_jax.upscaling.experts import EXPERT_PARAMETERS
from opt_deus_jax.upscaling.features import (
    check_parameters,
    fold_features,
    shift_norms,
    unfold_features,
)
from opt_deus_jax.upscaling.new_block import Block

_BRANCHES = (("value", "output"), ("up", "down"), ("experts_up", "experts_down"))


def scale_branches(block: Block, scale: float) -> dict[str, np.ndarray]:
    """Multiplies value and up, also of every expert, and divides output and down by the same.

    A step of output or down, zero at first, then changes the residual stream `scale` times as much:
    a step size of their own, without an optimizer that knows of it.

    Args:
        block: float32 arrays by the names of `block_specs`.
        scale: Above 0.

    Returns:
        A block that computes the same; exactly, where `scale` is a power of two.

    Raises:
        UserError: The block has parameters that are not known here.
    """
    check_parameters(block, f"config field upscale.branch_scale={scale}", EXPERT_PARAMETERS)
    scaled = dict(block)
    for reader, writer in _BRANCHES:
        for name in (f"{reader}_kernel", f"{reader}_bias"):
            if name in block:
                scaled[name] = block[name] * np.float32(scale)
        if f"{writer}_kernel" in block:
            scaled[f"{writer}_kernel"] = block[f"{writer}_kernel"] / np.float32(scale)
    return scaled


def balance_branches(block: Block, config: ModelConfig) -> dict[str, np.ndarray]:
    """Gives the features that output and down will weigh the same size, and values no overlap.

    The rows of each KV head's values become orthogonal and of one norm: the nearest such to what
    they were, (V V')^(-1/2) V, scaled back to the norm of V. Each row of up gets the mean norm
    of all. Without this, weak directions are slow to be used by steps that are of one size.

    Args:
        block: float32 arrays by the names of `block_specs`, output and down kernels zero.
        config: The network.

    Returns:
        A block whose values and neurons span what they spanned.

    Raises:
        UserError: The block has parameters that are not known here.
        ValueError: Output or down is not zero: its function would change.
    """
    check_parameters(block, "config field upscale.balance='kernels'")
    if block["output_kernel"].any() or block["down_kernel"].any():
        raise ValueError("only a block whose output and down kernels are zero can be balanced")
    offset = config.norm.offset
    block = shift_norms(block, offset)
    features = fold_features(block, ("value", "up"))
    heads_KHD = features["value"].reshape(config.num_kv_heads, config.head_dim, -1)
    left, _, right = np.linalg.svd(heads_KHD, full_matrices=False)
    norm_K11 = np.linalg.norm(heads_KHD, axis=(1, 2), keepdims=True)
    even_KHD = left @ right * (norm_K11 / np.sqrt(np.float32(config.head_dim)))
    up_norm_N1 = np.linalg.norm(features["up"], axis=1, keepdims=True)
    balanced = {
        "value": even_KHD.reshape(features["value"].shape),
        "up": restore_rows(features["up"], np.full_like(up_norm_N1, up_norm_N1.mean())),
    }
    return dict(shift_norms({**block, **unfold_features(balanced, block, block)}, -offset))
