"""Depth as a short list of repeated patterns, and the split of a param pytree by trainability.

Everything here is integers and tree algebra. A pattern repeated r times becomes one `lax.scan` of
length r, so what is compiled grows with the length of the patterns and not with the depth.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from opt_deus_jax.errors import UserError
from opt_deus_jax.models.language_model import BlockParams, Params
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.params import block_specs, outer_specs


@dataclasses.dataclass(frozen=True)
class Segment:
    """A pattern of blocks, repeated.

    Attributes:
        pattern: For each place in the pattern, whether its block is trained.
        repeats: How often the pattern follows itself.
        first_depth: Depth of the first block.
    """

    pattern: tuple[bool, ...]
    repeats: int
    first_depth: int


def depth_of(segment: Segment, repeat: int, place: int) -> int:
    """Depth of the block at `place` of the pattern in its `repeat`-th repetition."""
    return segment.first_depth + repeat * len(segment.pattern) + place


def _candidates(trained_by_depth: tuple[bool, ...], first: int) -> list[Segment]:
    # A longer pattern must repeat: unrepeated it would save no compilation, and a frozen prefix
    # in one pattern with trained blocks would be kept for a backward pass that it does not need.
    left = len(trained_by_depth) - first
    found = []
    for length in range(1, left + 1):
        pattern = trained_by_depth[first : first + length]
        repeats = 1
        while True:
            if length == 1 or repeats > 1:
                found.append(Segment(pattern, repeats, first))
            end = first + repeats * length
            if trained_by_depth[end : end + length] != pattern:
                break
            repeats += 1
    return found


def plan_segments(trained_by_depth: Sequence[bool]) -> tuple[Segment, ...]:
    """Covers the depth, in order, with the shortest repeated patterns.

    The fewest blocks are compiled (the sum of the lengths of the patterns is least); among equals
    there are the fewest segments, and among those each segment from the bottom up is the longest.

    Args:
        trained_by_depth: Whether each block is trained, from the bottom up.

    Returns:
        Segments; the top layout 32 -> 48 gives F x 16, then (T F) x 16.

    Raises:
        ValueError: There is no block.
    """
    mask = tuple(bool(trained) for trained in trained_by_depth)
    if not mask:
        raise ValueError("a network needs at least one block")
    best: list[tuple[int, int, Segment | None]] = [(0, 0, None)] * (len(mask) + 1)
    for first in reversed(range(len(mask))):
        costs = []
        for segment in _candidates(mask, first):
            blocks = segment.repeats * len(segment.pattern)
            cost, count, _ = best[first + blocks]
            costs.append((cost + len(segment.pattern), count + 1, -blocks, segment))
        cost, count, _, segment = min(costs, key=lambda candidate: candidate[:3])
        best[first] = (cost, count, segment)
    segments = []
    depth = 0
    while (segment := best[depth][2]) is not None:
        segments.append(segment)
        depth += segment.repeats * len(segment.pattern)
    return tuple(segments)


def stack_blocks(
    blocks: Sequence[BlockParams], segments: Sequence[Segment]
) -> list[list[BlockParams]]:
    """Stacks the blocks of a network, from the bottom up, into its segments.

    Args:
        blocks: Parameters of each block by depth.
        segments: From `plan_segments`.

    Returns:
        The "segments" of a param pytree.
    """
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
    """Undoes `stack_blocks`.

    Args:
        stacked: The "segments" of a param pytree.
        segments: From `plan_segments`.

    Returns:
        Parameters of each block by depth.
    """
    return [
        {name: leaf[repeat] for name, leaf in block.items()}
        for segment, pattern in zip(segments, stacked, strict=True)
        for repeat in range(segment.repeats)
        for block in pattern
    ]


def trained_mask(config: ModelConfig, segments: Sequence[Segment], trained: str) -> dict[str, Any]:
    """Says for every leaf of a param pytree whether it is trained.

    Args:
        config: The network.
        segments: From `plan_segments`.
        trained: `new` trains the blocks that the segments mark; `all` trains the whole network,
            embedding, final norm and head included, and every block must be marked.

    Returns:
        A tree of bools with the structure of the param pytree.

    Raises:
        UserError: With `new` there is nothing to train.
        ValueError: With `all` a block is not marked, or `trained` is another word.
    """
    places = [is_trained for segment in segments for is_trained in segment.pattern]
    if trained not in ("new", "all"):
        raise ValueError(f"trained={trained!r}: use new or all")
    if trained == "all" and not all(places):
        raise ValueError("trained='all', but trained_by_depth leaves a block out")
    if not any(places):
        raise UserError(
            "config field upscale.trained='new': the model has no new layer to train; use "
            "--config.upscale.trained=all"
        )
    mask: dict[str, Any] = {name: trained == "all" for name in outer_specs(config)}
    names = block_specs(config)
    mask["segments"] = [
        [dict.fromkeys(names, is_trained) for is_trained in segment.pattern] for segment in segments
    ]
    return mask


def invert_mask(mask: Any) -> Any:
    """Turns every bool of a tree around."""
    return jax.tree.map(lambda is_true: not is_true, mask)


def partition(params: Params, mask: Any) -> tuple[Params, Params]:
    """Splits a param pytree into what is trained and what is frozen.

    Args:
        params: A param pytree.
        mask: From `trained_mask`.

    Returns:
        (trainable, frozen), each with the structure of `params` and None for what is in the other.

    Raises:
        ValueError: A leaf is in only one of `params` and `mask`, or is None.
    """
    if jax.tree.structure(params) != jax.tree.structure(mask):
        raise ValueError("params and their mask of trained leaves differ in structure")
    trainable = jax.tree.map(lambda leaf, is_trained: leaf if is_trained else None, params, mask)
    frozen = jax.tree.map(lambda leaf, is_trained: None if is_trained else leaf, params, mask)
    return trainable, frozen


def merge(trainable: Params, frozen: Params) -> Params:
    """Undoes `partition`.

    Args:
        trainable: A param pytree with None for frozen leaves.
        frozen: A param pytree with None for trained leaves.

    Returns:
        The param pytree.

    Raises:
        ValueError: A leaf is in both or in neither.
    """

    def pick(path: Any, left: Any, right: Any) -> Any:
        if (left is None) == (right is None):
            where = "neither" if left is None else "both"
            name = jax.tree_util.keystr(path)
            raise ValueError(f"parameter {name} is in {where} of trainable and frozen")
        return right if left is None else left

    return jax.tree_util.tree_map_with_path(
        pick, trainable, frozen, is_leaf=lambda leaf: leaf is None
    )
