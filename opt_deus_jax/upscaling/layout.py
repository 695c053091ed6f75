"""Where new layers go: pure integers, from a layout's name to a line per layer."""

import dataclasses
from collections.abc import Sequence

from opt_deus_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LayerOrigin:
    """Where one layer of the grown model comes from.

    Attributes:
        depth: Its place in the grown model.
        base_layer: The base layer that it is; None for a fused layer.
        previous: For a new layer: the base layer below it, parent A.
        next: For a new layer: the base layer above it, parent B; None after the last base layer,
            where methods that need B take A for both.
        is_new: Whether it counts as new when only new layers are trained. In a stack the second
            copy of a base layer is new although its weights are a base layer's.
    """

    depth: int
    base_layer: int | None
    previous: int | None
    next: int | None
    is_new: bool


def _gaps_of(layout: str, num_layers: int, num_new: int, gaps: Sequence[int]) -> list[int]:
    num_gaps = num_layers - 1
    if layout == "explicit":
        return list(gaps)
    if num_new > num_gaps:
        raise UserError(
            f"config field upscale.num_new_layers={num_new}: layout {layout!r} has only {num_gaps} "
            f"gaps between {num_layers} base layers; use at most {num_gaps}"
        )
    every = range(num_gaps)
    below = num_new // 2
    start = (num_gaps - num_new) // 2
    return {
        "top": list(every[num_gaps - num_new :]),
        "bottom": list(every[:num_new]),
        "middle": list(every[start : start + num_new]),
        # With an odd number the top gets one more.
        "top_and_bottom": [*every[:below], *every[num_gaps - (num_new - below) :]],
    }[layout]


def _check_gaps(gaps: Sequence[int], num_layers: int) -> None:
    wrong = [gap for gap in gaps if not 0 <= gap < num_layers]
    if wrong or len(set(gaps)) != len(gaps) or not gaps:
        raise UserError(
            f"config field upscale.gaps={tuple(gaps)}: give distinct numbers from 0 to "
            f"{num_layers - 1} (gap g lies above base layer g), at least one"
        )


def _uniform_gaps(num_layers: int, num_new: int) -> list[int]:
    if num_new > num_layers or num_layers % num_new:
        raise UserError(
            f"config field upscale.num_new_layers={num_new}: layout 'uniform' needs a divisor of "
            f"the base's {num_layers} layers"
        )
    group = num_layers // num_new
    return [group * (i + 1) - 1 for i in range(num_new)]


def _stack(num_layers: int, num_new: int) -> tuple[LayerOrigin, ...]:
    if num_new > num_layers:
        raise UserError(
            f"config field upscale.num_new_layers={num_new}: layout 'stack' adds at most the "
            f"base's {num_layers} layers"
        )
    # SOLAR's halves; where the target depth is odd the lower one gets one more.
    lower = (num_layers + num_new + 1) // 2
    first_of_upper = num_layers - (num_layers + num_new) // 2
    base_layers = [*range(lower), *range(first_of_upper, num_layers)]
    return tuple(
        LayerOrigin(depth, layer, None, None, is_new=depth >= lower and layer < lower)
        for depth, layer in enumerate(base_layers)
    )


def plan_layout(
    layout: str, num_layers: int, num_new: int, gaps: Sequence[int] = ()
) -> tuple[LayerOrigin, ...]:
    """Lists the layers of the grown model from the embedding up.

    Args:
        layout: top, bottom, middle, top_and_bottom, uniform, stack or explicit.
        num_layers: Depth of the base.
        num_new: How many layers are added; for `explicit`, 0 or the number of gaps.
        gaps: For `explicit` only.

    Returns:
        One origin per layer, `depth` running from 0.

    Raises:
        UserError: The layout has no room for so many layers, or the fields contradict each other.
    """
    if (layout == "explicit") != bool(gaps):
        raise UserError(
            f"config field upscale.gaps={tuple(gaps)}: goes with upscale.layout=explicit, "
            f"found layout {layout!r}"
        )
    if layout == "explicit":
        _check_gaps(gaps, num_layers)
        if num_new not in (0, len(gaps)):
            raise UserError(
                f"config field upscale.num_new_layers={num_new}: upscale.gaps names {len(gaps)}; "
                "leave it at 0"
            )
    elif num_new < 0:
        raise UserError(f"config field upscale.num_new_layers={num_new}: give 0 or more")
    if num_new == 0 and not gaps:
        return tuple(LayerOrigin(i, i, None, None, is_new=False) for i in range(num_layers))
    if layout == "stack":
        return _stack(num_layers, num_new)
    if layout == "uniform":
        chosen = set(_uniform_gaps(num_layers, num_new))
    else:
        chosen = set(_gaps_of(layout, num_layers, num_new, gaps))
    origins: list[LayerOrigin] = []
    for layer in range(num_layers):
        origins.append(LayerOrigin(len(origins), layer, None, None, is_new=False))
        if layer in chosen:
            above = layer + 1 if layer + 1 < num_layers else None
            origins.append(LayerOrigin(len(origins), None, layer, above, is_new=True))
    return tuple(origins)


def parents_of(layers: Sequence[LayerOrigin], *, prefer_previous: bool) -> tuple[int, ...]:
    """The base layer whose kind each layer of the grown model has.

    Args:
        layers: From `plan_layout`.
        prefer_previous: Whether a new layer follows the one below it, as a copy of that must;
            otherwise it follows the one above, where there is one.

    Returns:
        A base layer for each.

    Raises:
        ValueError: A layer is neither a base layer nor has a parent.
    """
    parents = []
    for layer in layers:
        in_order = (layer.next, layer.previous)
        candidates = (layer.base_layer, *(in_order[::-1] if prefer_previous else in_order))
        known = [candidate for candidate in candidates if candidate is not None]
        if not known:
            raise ValueError(f"layer {layer.depth} is neither a base layer nor has a parent")
        parents.append(known[0])
    return tuple(parents)
