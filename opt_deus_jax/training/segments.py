"""Which parameters are trained, and depth as a short list of repeated patterns.

Everything here is names, integers and tree algebra. A pattern repeated r times becomes one
`lax.scan` of length r, so what is compiled grows with the length of the patterns and not with the
depth.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax

from opt_deus_jax.errors import UserError
from opt_deus_jax.models.language_model import Params
from opt_deus_jax.models.layer_kinds import LayerKind
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.params import ParamSpec, block_specs, outer_specs

BlockNames = frozenset[str]


@dataclasses.dataclass(frozen=True)
class TrainedNames:
    """The parameters that are trained, by their names in the param pytree.

    Attributes:
        outer: Those outside the blocks, of `outer_specs`. Where embedding and head are tied, the
            embedding stands for both.
        blocks: For each depth, those of its block, of `block_specs`; empty where it is frozen.
    """

    outer: frozenset[str]
    blocks: tuple[BlockNames, ...]


def select_trained(config: ModelConfig, is_new: Sequence[bool], trained: str) -> TrainedNames:
    """Finds the parameters that `upscale.trained` means.

    Args:
        config: The network; its own depth is not used where all layers are of one kind.
        is_new: For each depth, whether its layer is new.
        trained: `new` for all parameters of the new layers, `all` for everything, or a regular
            expression: parameters are trained where it finds something in their Hugging Face name.

    Returns:
        At least one name.

    Raises:
        UserError: The expression is invalid, or nothing is selected.
    """
    outer = outer_specs(config)
    blocks = [block_specs(config, kind) for kind in config.kinds_of(len(is_new))]
    if trained == "all":
        return TrainedNames(frozenset(outer), tuple(map(frozenset, blocks)))
    if trained == "new":
        if not any(is_new):
            raise UserError(
                "config field upscale.trained='new': the model has no new layer to train; use "
                "--config.upscale.trained=all"
            )
        return TrainedNames(
            frozenset(),
            tuple(
                frozenset(block) if new else frozenset()
                for block, new in zip(blocks, is_new, strict=True)
            ),
        )
    try:
        expression = re.compile(trained)
    except re.error as error:
        raise UserError(
            f"config field upscale.trained={trained!r}: neither new nor all nor a regular "
            f"expression ({error}); mend it"
        ) from None
    names = TrainedNames(
        frozenset(name for name, spec in outer.items() if expression.search(spec.hf_name)),
        tuple(
            frozenset(
                name
                for name, spec in block.items()
                if expression.search(spec.hf_name.format(layer=depth))
            )
            for depth, block in enumerate(blocks)
        ),
    )
    if not names.outer and not any(names.blocks):
        example = blocks[-1]["query_kernel"].hf_name.format(layer=len(is_new) - 1)
        raise UserError(
            f"config field upscale.trained={trained!r}: found in no tensor's name; names look like "
            f"{example}"
        )
    return names


@dataclasses.dataclass(frozen=True)
class Segment:
    """A pattern of blocks, repeated.

    Attributes:
        pattern: For each place in the pattern, the trained parameters of its block.
        repeats: How often the pattern follows itself.
        first_depth: Depth of the first block.
    """

    pattern: tuple[BlockNames, ...]
    repeats: int
    first_depth: int


def depth_of(segment: Segment, repeat: int, place: int) -> int:
    """Depth of the block at `place` of the pattern in its `repeat`-th repetition."""
    return segment.first_depth + repeat * len(segment.pattern) + place


# What tells the blocks of a pattern apart: their trained parameters and the kind of their layer.
_Label = tuple[BlockNames, LayerKind | None]


def _candidates(labels: tuple[_Label, ...], first: int) -> list[Segment]:
    # A longer pattern must repeat: unrepeated it would save no compilation. A frozen prefix in one
    # pattern with trained blocks would be kept for a backward pass that it does not need.
    is_prefix = not any(names for names, _ in labels[: first + 1])
    left = len(labels) - first
    found = []
    for length in range(1, left + 1):
        pattern = labels[first : first + length]
        names = tuple(names for names, _ in pattern)
        if is_prefix and any(names):
            break
        repeats = 1
        while True:
            if length == 1 or repeats > 1:
                found.append(Segment(names, repeats, first))
            end = first + repeats * length
            if labels[end : end + length] != pattern:
                break
            repeats += 1
    return found


def plan_segments(
    trained_by_depth: Sequence[BlockNames], kinds: Sequence[LayerKind] = ()
) -> tuple[Segment, ...]:
    """Covers the depth, in order, with the shortest repeated patterns.

    Blocks are alike where the same of their parameters are trained and their layers are of one
    kind: what a layer computes differently is static in the pattern, so none computes for two.

    The frozen blocks below the lowest trained one are never in one segment with trained blocks.
    With that, the fewest blocks are compiled (the sum of the lengths of the patterns is least);
    among equals there are the fewest segments, and among those each segment from the bottom up is
    the longest.

    Args:
        trained_by_depth: The trained parameters of each block, from the bottom up.
        kinds: The kind of each layer, as `ModelConfig.layer_kinds`; none where all are alike.

    Returns:
        Segments; the top layout 32 -> 48 gives F x 16, then (T F) x 16.

    Raises:
        ValueError: There is no block, or not a kind for each.
    """
    if not trained_by_depth:
        raise ValueError("a network needs at least one block")
    if len(set(kinds)) <= 1:
        kinds = tuple(kinds[:1]) * len(trained_by_depth)
    blocks: tuple[_Label, ...] = tuple(
        zip(trained_by_depth, kinds or [None] * len(trained_by_depth), strict=True)
    )
    best: list[tuple[int, int, Segment | None]] = [(0, 0, None)] * (len(blocks) + 1)
    for first in reversed(range(len(blocks))):
        costs = []
        for segment in _candidates(blocks, first):
            covered = segment.repeats * len(segment.pattern)
            cost, count, _ = best[first + covered]
            costs.append((cost + len(segment.pattern), count + 1, -covered, segment))
        cost, count, _, segment = min(costs, key=lambda candidate: candidate[:3])
        best[first] = (cost, count, segment)
    segments = []
    depth = 0
    while (segment := best[depth][2]) is not None:
        segments.append(segment)
        depth += segment.repeats * len(segment.pattern)
    return tuple(segments)


def pattern_specs(
    config: ModelConfig, segments: Sequence[Segment]
) -> list[list[dict[str, ParamSpec]]]:
    """The parameters of the blocks of every pattern.

    Args:
        config: The network; its own depth is not used where all layers are of one kind.
        segments: From `plan_segments`.

    Returns:
        For each segment, the specs for each place in its pattern.
    """
    kinds = config.kinds_of(sum(s.repeats * len(s.pattern) for s in segments))
    return [
        [block_specs(config, kinds[depth_of(s, 0, place)]) for place in range(len(s.pattern))]
        for s in segments
    ]


def trained_mask(
    config: ModelConfig, segments: Sequence[Segment], outer: frozenset[str]
) -> dict[str, Any]:
    """Says for every leaf of a param pytree whether it is trained.

    Args:
        config: The network.
        segments: From `plan_segments`.
        outer: The trained parameters outside the blocks, of `TrainedNames`.

    Returns:
        A tree of bools with the structure of the param pytree.

    Raises:
        ValueError: A name is none of the network's.
    """
    outer_names = outer_specs(config)
    unknown = outer - outer_names.keys()
    mask: dict[str, Any] = {name: name in outer for name in outer_names}
    mask["segments"] = []
    for segment, specs in zip(segments, pattern_specs(config, segments), strict=True):
        pairs = list(zip(segment.pattern, specs, strict=True))
        unknown = unknown.union(*(names - block.keys() for names, block in pairs))
        mask["segments"].append([{name: name in names for name in block} for names, block in pairs])
    if unknown:
        raise ValueError(f"trained parameters {sorted(unknown)} are none of the network's")
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
