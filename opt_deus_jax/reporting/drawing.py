"""Parts that pictures of many contenders share: few colours, direct labels, dots with errors."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from opt_deus_jax.reporting.plots import COLOURS

# Tokens, and losses by seed.
Curve = tuple[Float[np.ndarray, " s"], dict[int, Float[np.ndarray, " s"]]]
OTHERS = "0.72"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Between label lines, as a share of the axis' height.
_LINE_HEIGHT = 0.05


class Style(NamedTuple):
    """How a contender looks in every picture.

    Attributes:
        colour: A colour; grey for those that are not highlighted.
        marker: Tells the highlighted apart without colour.
        front: Whether it is highlighted.
    """

    colour: str
    marker: str
    front: bool


class Dot(NamedTuple):
    """A line of a dot plot.

    Attributes:
        name: Its label.
        centre: The mean.
        error: Its standard error.
        interval: Half width of a wider interval, drawn thin.
        points: What the mean is of.
    """

    name: str
    centre: float
    error: float | None = None
    interval: float | None = None
    points: Sequence[float] = ()


def styles(names: Sequence[str], highlighted: Sequence[str]) -> dict[str, Style]:
    """A style for each name: colours for at most seven that are highlighted, grey for the rest."""
    front = [name for name in highlighted if name in names][: len(COLOURS)]
    looks = {name: Style(OTHERS, ".", front=False) for name in names}
    for i, name in enumerate(front):
        looks[name] = Style(COLOURS[i], _MARKERS[i], front=True)
    return looks


def label_ends(
    axis: Axes, ends: Mapping[str, float], looks: Mapping[str, Style], *, height: float = 1.0
) -> None:
    """Writes names right of the axis, at the ends of their lines, kept apart.

    Args:
        axis: With its limits set.
        ends: By name, where its line ends.
        looks: Of the names.
        height: Of the axis in units of a usual one, so that lines do not overlap in a low one.
    """
    low, high = axis.get_ylim()
    wanted = {
        name: float(np.clip((end - low) / (high - low), 0, 1))
        for name, end in ends.items()
        if math.isfinite(end)
    }
    placed = _spread(wanted, _LINE_HEIGHT / height)
    for name, place in placed.items():
        axis.annotate(
            name,
            xy=(1.0, wanted[name]),
            xytext=(1.05, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=looks[name].colour if looks[name].front else "0.4",
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": looks[name].colour, "linewidth": 0.6},
            annotation_clip=False,
        )


def _spread(wanted: Mapping[str, float], gap: float) -> dict[str, float]:
    """Moves places up or down until they are a gap apart, keeping their order."""
    names = sorted(wanted, key=lambda name: wanted[name])
    places = [wanted[name] for name in names]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    # As much up as down: the block is centred on where its members wanted to be.
    shift = float(np.mean(places) - np.mean([wanted[name] for name in names])) if names else 0.0
    return {name: place - shift for name, place in zip(names, places, strict=True)}


def robust_limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits that show all values but those far out, which would press the others together.

    Args:
        values: At least one of them finite.

    Returns:
        Low and high: of values within three interquartile ranges of the quartiles, and some room.
    """
    finite = np.asarray([value for value in values if math.isfinite(value)])
    first, third = np.percentile(finite, [25, 75])
    reach = 3 * (third - first) if third > first else math.inf
    inside = finite[(finite >= first - reach) & (finite <= third + reach)]
    room = 0.06 * (inside.max() - inside.min()) or 0.05 * abs(inside.max()) or 1.0
    return float(inside.min() - room), float(inside.max() + room)


def draw_dots(
    axis: Axes, dots: Sequence[Dot], looks: Mapping[str, Style], *, named: bool = True
) -> None:
    """Draws a line for each, the first at the top; what is far out is an arrow with its value.

    Args:
        axis: To draw on.
        dots: What to draw.
        looks: Of their names.
        named: Whether to write the names left of the axis.
    """
    reach = [
        value
        for dot in dots
        for value in (dot.centre - (dot.error or 0), dot.centre + (dot.error or 0), *dot.points)
    ]
    low, high = robust_limits(reach)
    for y, dot in enumerate(dots):
        look = looks[dot.name]
        colour = look.colour if look.front else "0.45"
        if not low <= dot.centre <= high:
            _draw_far(axis, y, dot.centre, (low, high), colour)
            continue
        if dot.interval is not None:
            axis.plot([dot.centre - dot.interval, dot.centre + dot.interval], [y, y], color=colour)
        if dot.points:
            drawn: dict[str, Any] = {"color": "none", "edgecolors": colour, "s": 14, "zorder": 2}
            axis.scatter(dot.points, [y] * len(dot.points), linewidths=0.8, **drawn)
        axis.errorbar(
            *(dot.centre, y),
            xerr=dot.error,
            fmt=look.marker if look.front else "o",
            color=colour,
            markersize=5,
            elinewidth=2.4,
            zorder=3,
        )
    axis.set_xlim(low, high)
    axis.set_ylim(len(dots) - 0.4, -0.6)
    axis.set_yticks(range(len(dots)), [dot.name for dot in dots] if named else [])
    axis.grid(axis="y", color="0.93")
    axis.set_axisbelow(True)


def _draw_far(axis: Axes, y: int, value: float, limits: tuple[float, float], colour: str) -> None:
    left = value < limits[0]
    place = limits[0] if left else limits[1]
    axis.plot([place], [y], "<" if left else ">", color=colour, markersize=5, clip_on=False)
    axis.annotate(
        f"{value:.3g}" if math.isfinite(value) else "diverged",
        xy=(place, y),
        xytext=(7 if left else -7, 0),
        textcoords="offset points",
        ha="left" if left else "right",
        va="center",
        fontsize=7,
        color=colour,
    )
