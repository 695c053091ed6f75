"""Parameters, FLOPs and memory of a network, from its shape alone."""

import dataclasses
from collections.abc import Sequence

from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.params import block_size, block_specs, outer_size


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a network takes.

    Attributes:
        parameters: All parameters.
        trained_parameters: Those that are trained.
        forward_flops: Floating-point operations a token of a forward pass (a multiply-add is 2).
        backward_flops: The same for the backward pass, which ends at the lowest trained layer.
        expansion_bytes: Memory of expansion beyond the interpreter: two parents, the new block,
            the widest transport plan with its cost and work space, one vocabulary kernel.
        training_bytes: Memory of training beyond activations: frozen parameters, float32 masters,
            gradients and both AdamW moments of the trained ones.
    """

    parameters: int
    trained_parameters: int
    forward_flops: int
    backward_flops: int
    expansion_bytes: int
    training_bytes: int


def _attention_flops(config: ModelConfig, length: int) -> int:
    # Scores and weighted sum over all keys, as computed without skipping the masked half.
    return 2 * 2 * length * config.num_heads * config.head_dim


def _block_matmul_flops(config: ModelConfig) -> int:
    return 2 * sum(spec.size for spec in block_specs(config).values() if len(spec.shape) == 2)


def count_costs(
    config: ModelConfig,
    is_trained: Sequence[bool],
    *,
    outer_trained: bool,
    sequence_length: int,
    frozen_bytes: int,
) -> Costs:
    """Counts exactly what the segments of a training step compute.

    Args:
        config: The network; its own depth is not used.
        is_trained: For every layer whether it is trained.
        outer_trained: Whether embedding, final norm and head are trained.
        sequence_length: Tokens a sequence.
        frozen_bytes: Bytes a frozen parameter.

    Returns:
        The counts.
    """
    depth = len(is_trained)
    block_flops, attention = _block_matmul_flops(config), _attention_flops(config, sequence_length)
    head_flops = 2 * config.vocabulary_size * config.width
    parameters = depth * block_size(config) + outer_size(config)
    trained = sum(is_trained) * block_size(config) + (outer_size(config) if outer_trained else 0)
    lowest = 0 if outer_trained else next((i for i, t in enumerate(is_trained) if t), depth)
    reached = depth - lowest
    backward = (
        reached * (block_flops + 2 * attention)
        + sum(is_trained) * block_flops
        + head_flops * (2 if outer_trained else 1)
    )
    widest = max(max(spec.shape[:1]) for spec in block_specs(config).values())
    return Costs(
        parameters=parameters,
        trained_parameters=trained,
        forward_flops=depth * (block_flops + attention) + head_flops,
        backward_flops=backward if trained else 0,
        expansion_bytes=4
        * (3 * block_size(config) + 4 * widest**2 + config.vocabulary_size * config.width),
        training_bytes=(parameters - trained) * frozen_bytes + trained * 16,
    )
