"""The authors' published results beside ours, clearly apart."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opt_deus_jax.reporting.drawing import (
    Dot,
    Style,
    draw_dots,
    label_ends,
    robust_limits,
    styles,
    write_title,
)
from opt_deus_jax.reporting.plots import LOOK


@mpl.rc_context(LOOK)
def published_beside_ours(
    theirs: Mapping[str, Sequence[tuple[int, float, float]]],
    ours: Sequence[Mapping[str, Any]],
    counterparts: Mapping[str, str],
    labels: tuple[str, str],
) -> Figure:
    """Word perplexity and mean accuracy: theirs by step at the left, ours at the end at the right.

    Args:
        theirs: By method, the best first: step, word perplexity and mean accuracy.
        ours: From `contender_rows`.
        counterparts: Which of their methods some of our contenders are; these share colours.
        labels: What theirs and ours are of.

    Returns:
        A figure; the scales of the two sides have nothing to do with each other.
    """
    figure = Figure(figsize=(12, max(6.5, 4 + 0.2 * len(ours))), dpi=120, layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, wspace=0.06).flat
    looks = styles(list(theirs), list(theirs))
    for side, label, shade in ((left, labels[0], "0.96"), (right, labels[1], "white")):
        side.set_facecolor(shade)
        side.suptitle(label, fontsize=9, fontweight="bold")
    upper, lower = left.subplots(2, 1, sharex=True)
    _draw_steps(upper, {name: [x[:2] for x in found] for name, found in theirs.items()}, looks)
    by_step = {name: [(x[0], 100 * x[2]) for x in found] for name, found in theirs.items()}
    _draw_steps(lower, by_step, looks)
    upper.set_ylabel("wikitext word perplexity")
    lower.set_ylabel("mean accuracy, %")
    lower.set_xlabel("optimizer step")
    own = {row["contender"]: Style("0.45", "o", front=False) for row in ours}
    own |= {name: looks[theirs] for name, theirs in counterparts.items() if theirs in looks}
    upper, lower = right.subplots(2, 1)
    _draw_ours(upper, ours, own, ("word_perplexity", "word_perplexity_stderr"), 1.0)
    _draw_ours(lower, ours, own, ("accuracy", "accuracy_binomial"), 100.0)
    upper.set_xlabel("wikitext word perplexity after training\nbar: standard error over seeds")
    lower.set_xlabel("mean accuracy after training, %\nbar: standard error of the questions")
    tried = set(counterparts.values())
    order = " < ".join(name for name in theirs if name in tried)
    known = [row for row in ours if row["word_perplexity"] is not None]
    known.sort(key=lambda row: row["word_perplexity"])
    our_order = " < ".join(r["contender"] for r in known if r["contender"] in counterparts)
    title = f"Word perplexity, published: {order}; ours, the same methods: {our_order or '-'}"
    write_title(figure, title if tried else "None of ours is a method that they have tried")
    return figure


def _draw_steps(
    axis: Axes, curves: Mapping[str, Sequence[tuple[float, float]]], looks: Mapping[str, Style]
) -> None:
    for name, points in curves.items():
        look = looks[name]
        axis.plot(*zip(*points, strict=True), marker=look.marker, color=look.colour, markersize=4)
    axis.set_ylim(*robust_limits([y for points in curves.values() for _, y in points]))
    axis.margins(x=0.02)
    label_ends(axis, {name: points[-1] for name, points in curves.items()}, looks, inches=2.6)


def _draw_ours(
    axis: Axes,
    rows: Sequence[Mapping[str, Any]],
    looks: Mapping[str, Style],
    fields: tuple[str, str],
    scale: float,
) -> None:
    value, error = fields
    dots = [
        Dot(row["contender"], scale * row[value], row[error] and scale * row[error])
        for row in rows
        if row[value] is not None
    ]
    if dots:
        # The best at the top, as in the panel of theirs it is the lowest perplexity.
        dots.sort(key=lambda dot: dot.centre, reverse=value == "accuracy")
        draw_dots(axis, dots, looks)
    else:
        axis.text(0.5, 0.5, "not taken", transform=axis.transAxes, ha="center")
        axis.set_axis_off()
