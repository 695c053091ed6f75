"""A block as rows, one for each feature: what symmetries of the network permute and turn.

Norms are folded into the kernels that read behind them, so that rows of two blocks mean the same;
biases are a last column, since they see an input of one; output kernels are transposed.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from opt_deus_jax.errors import UserError
from opt_deus_jax.transport.sinkhorn import Coupling
from opt_deus_jax.upscaling.new_block import Block, OnRead, TransportMap

# Rows of an attention head, and of a neuron, with the norm that each matrix reads behind.
HEAD_MATRICES = ("query", "key", "value", "output")
NEURON_MATRICES = ("gate", "up", "down")
_NORM_OF = {
    **dict.fromkeys(("query", "key", "value"), "input_norm"),
    **dict.fromkeys(("gate", "up", "router"), "post_attention_norm"),
}
NORMS = ("input_norm", "post_attention_norm")
_OUTPUTS = ("output", "down")

Features = Mapping[str, Float[np.ndarray, "n d"]]


class UnitMatch(NamedTuple):
    """Which units of A, heads in groups or neurons, stand for B's, and how they are laid on them.

    Attributes:
        maps: By matrix name, [m, n], to be applied as `map.T @ rows of A`. Those that leave A's
            function alone are sparse.
        source_U: For each unit of B its (strongest) unit of A.
        mean_cost: Mean distance of a unit of A from one of B, each pair laid at its best.
        matched_cost: The same of the matched ones.
        coupling: The plan, where the match is soft.
    """

    maps: dict[str, TransportMap]
    source_U: Int[np.ndarray, " u"]
    mean_cost: float
    matched_cost: float
    coupling: Coupling | None = None


def check_parameters(block: Block, field: str, also: tuple[str, ...]) -> None:
    """Refuses a block whose features are not known here.

    Args:
        block: Arrays by parameter name.
        field: What was asked for, to be named where it is refused.
        also: Parameters that are known beside those of a Llama.

    Raises:
        UserError: It has a parameter that a change of its features might not leave alone.
    """
    matrices = HEAD_MATRICES + NEURON_MATRICES
    known = {f"{name}_{kind}" for name in matrices for kind in ("kernel", "bias")}
    unknown = sorted(block.keys() - known - {*NORMS, *also})
    if unknown:
        raise UserError(
            f"{field}: what leaves a block with {unknown[0]} unchanged is not known; use another"
        )


def shift_norms(block: Block, offset: float) -> Block:
    """Adds an offset to all norms: from what is stored to what is applied, or back.

    Args:
        block: Arrays by parameter name.
        offset: `ModelConfig.norm.offset`, or its negative.

    Returns:
        A block that shares all other arrays, and reads them when it is read.
    """
    if not offset:
        return block
    shift = np.float32(offset)

    def shifted(name: str) -> np.ndarray:
        return block[name] + shift if name.endswith("_norm") else block[name]

    return OnRead(shifted, block)


def fold_features(block: Block, names: tuple[str, ...]) -> Features:
    """Writes matrices of a block as rows of features.

    Args:
        block: float32 arrays by parameter name, norms as they are applied.
        names: Of `HEAD_MATRICES` and `NEURON_MATRICES`, or the router.

    Returns:
        By name, [features, width], or one column more where there is a bias; made when it is read.
    """

    def folded(name: str) -> np.ndarray:
        kernel = block[f"{name}_kernel"]
        if name in _OUTPUTS:
            return np.ascontiguousarray(kernel.T)
        # Some architectures have no norm there.
        rows = kernel * block.get(_NORM_OF[name], np.float32(1))
        if f"{name}_bias" not in block:
            return rows
        return np.concatenate([rows, block[f"{name}_bias"][:, None]], axis=1)

    return OnRead(folded, names)


def unfold_features(features: Features, norms: Block, like: Block) -> dict[str, np.ndarray]:
    """Takes a norm out of the kernels behind it again: the inverse of `fold_features`.

    Args:
        features: Rows by matrix name.
        norms: The norms that the new block has. Where one is 0, its kernels' column is 0 too.
        like: A block that says which matrices have biases.

    Returns:
        Kernels, biases of what reads, and the norms; biases of what writes are not features.
    """
    block: dict[str, np.ndarray] = {}
    for name, rows in features.items():
        if name in _OUTPUTS:
            block[f"{name}_kernel"] = np.ascontiguousarray(rows.T)
            continue
        width = like[f"{name}_kernel"].shape[1]
        block[f"{name}_kernel"] = rows[:, :width].copy()
        if _NORM_OF[name] in norms:
            norm = block[_NORM_OF[name]] = norms[_NORM_OF[name]]
            block[f"{name}_kernel"] /= np.where(norm == 0, np.float32(1), norm)
        if f"{name}_bias" in like:
            block[f"{name}_bias"] = rows[:, -1].copy()
    return block
