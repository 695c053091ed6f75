"""A network's blocks one by one, against the stacks of its segments."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from opt_deus_jax.models.language_model import BlockParams
from opt_deus_jax.training.segments import Segment, depth_of


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
