"""Parts that pictures of many contenders share: few colours, direct labels, dots with errors."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from opt_deus_jax.reporting.plots import COLOURS

# Tokens, and losses by seed.
Curve = tuple[Float[np.ndarray, " s"], dict[int, Float[np.ndarray, " s"]]]
OTHERS = "0.72"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINE_INCHES = 0.155
_LETTERS_AN_INCH = 13.5


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
    """A style for each name: by their order colours for seven highlighted, grey for the rest."""
    looks = {name: Style(OTHERS, "o", front=False) for name in names}
    for name, colour, marker in zip(highlighted, COLOURS, _MARKERS, strict=False):
        looks[name] = Style(colour, marker, front=True)
    return looks


def write_title(figure: Figure, text: str) -> None:
    """Writes a title over a figure in as many lines as its width asks for."""
    width = int(_LETTERS_AN_INCH * figure.get_figwidth())
    figure.suptitle(textwrap.fill(text, width), fontsize=10, x=0.01, ha="left")


def label_ends(
    axis: Axes,
    ends: Mapping[str, tuple[float, float]],
    looks: Mapping[str, Style],
    *,
    inches: float,
) -> None:
    """Writes names right of the axis, each with a dotted line to the end of its curve, kept apart.

    What ends out of view gets its value too.

    Args:
        axis: With its limits set.
        ends: By name the last point of its curve; those that are not finite get no label.
        looks: Of the names.
        inches: About how high the axis is.
    """
    low, high = axis.get_ylim()
    shown = {name: (x, min(max(y, low), high)) for name, (x, y) in ends.items() if math.isfinite(y)}
    if not shown:
        return
    names = sorted(shown, key=lambda name: ends[name][1])
    wanted = np.array([(shown[name][1] - low) / (high - low) for name in names])
    # The least squares nearest places that are a line apart and in the same order.
    apart = np.arange(len(names)) * _LINE_INCHES / inches
    places = isotonic_regression(wanted - apart).x + apart
    for name, place in zip(names, places, strict=True):
        look = looks[name]
        # Dotted, for a curve that ends early must not seem to go on.
        line = {
            "color": look.colour,
            "linewidth": 0.8,
            "linestyle": ":",
            "shrinkA": 0,
            "shrinkB": 0,
        }
        end = ends[name][1]
        axis.annotate(
            name if end == shown[name][1] else f"{name}: {end:.4g}",
            xy=shown[name],
            xytext=(1.06, float(place)),
            textcoords="axes fraction",
            color=look.colour if look.front else "0.4",
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "relpos": (0, 0.5)} | line,
            annotation_clip=False,
        )


def robust_limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits that show all values but those far out, which would press the others together.

    Args:
        values: Those that are not finite are left out.

    Returns:
        Low and high: of values within three interquartile ranges of the quartiles, and some room.
    """
    finite = np.asarray([value for value in values if math.isfinite(value)])
    if not finite.size:
        return 0.0, 1.0
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
    extents = [
        value
        for dot in dots
        for reach in (max(dot.error or 0, dot.interval or 0),)
        for value in (dot.centre - reach, dot.centre + reach, *dot.points)
    ]
    low, high = robust_limits(extents)
    # What a mean is of is shown whole where the mean is.
    points = [point for dot in dots if low <= dot.centre <= high for point in dot.points]
    edge = 0.02 * (high - low)
    low, high = min([low, *(x - edge for x in points)]), max([high, *(x + edge for x in points)])
    for y, dot in enumerate(dots):
        look = looks[dot.name]
        colour = look.colour if look.front else "0.45"
        if not low <= dot.centre <= high:
            _draw_far(axis, y, dot.centre, (low, high), colour)
            continue
        if dot.interval is not None:
            axis.plot(
                [dot.centre - dot.interval, dot.centre + dot.interval],
                [y, y],
                color=colour,
                linewidth=1,
            )
        if dot.points:
            drawn: dict[str, Any] = {"color": "none", "edgecolors": colour, "s": 14, "zorder": 2}
            axis.scatter(dot.points, [y] * len(dot.points), linewidths=0.8, **drawn)
        axis.errorbar(
            *(dot.centre, y),
            xerr=dot.error,
            fmt=look.marker,
            color=colour,
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.5,
            elinewidth=2.2,
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
        f"{value:.4g}" if math.isfinite(value) else "diverged",
        xy=(place, y),
        xytext=(7 if left else -7, 0),
        textcoords="offset points",
        ha="left" if left else "right",
        va="center",
        fontsize=7,
        color=colour,
    )
