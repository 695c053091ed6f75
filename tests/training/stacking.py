"""A network's blocks one by one, against the stacks of its segments."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from opt_deus_jax.models.language_model import BlockParams, Params
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.training.segments import Segment, depth_of
from opt_deus_jax.training.weights import hf_names, is_names


def stack_blocks(
    blocks: Sequence[BlockParams], segments: Sequence[Segment]
) -> list[list[BlockParams]]:
    """The "segments" of a param pytree, from the blocks by depth."""
    return [
        [
            jax.tree.map(
                lambda *leaves: jnp.stack(leaves),
                *(blocks[depth_of(segment, repeat, place)] for repeat in range(segment.repeats)),
            )
            for place in range(len(segment.pattern))
        ]
        for segment in segments
    ]


def unstack_blocks(
    stacked: Sequence[Sequence[BlockParams]], segments: Sequence[Segment]
) -> list[BlockParams]:
    """Undoes `stack_blocks`."""
    return [
        {name: leaf[repeat] for name, leaf in block.items()}
        for segment, pattern in zip(segments, stacked, strict=True)
        for repeat in range(segment.repeats)
        for block in pattern
    ]


def tensors_of(
    params: Params, config: ModelConfig, segments: Sequence[Segment]
) -> dict[str, np.ndarray]:
    """The tensors of the leaves that are there, by their Hugging Face names."""
    found: dict[str, np.ndarray] = {}

    def note(names: str | list[str], leaf: jax.Array | None) -> None:
        if leaf is not None:
            rows = [np.asarray(leaf)] if isinstance(names, str) else list(np.asarray(leaf))
            found.update(zip([names] if isinstance(names, str) else names, rows, strict=True))

    jax.tree.map(note, hf_names(config, segments), params, is_leaf=is_names)
    return found
