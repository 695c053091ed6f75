"""Pictures of what came of a comparison; each title says what its data shows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from opt_deus_jax.reporting.drawing import (
    Curve,
    Dot,
    Style,
    draw_dots,
    label_ends,
    robust_limits,
    styles,
)
from opt_deus_jax.reporting.plots import LOOK

# Of p below which a title calls a difference one; two-sided, not corrected.
SIGNIFICANT = 0.05


@mpl.rc_context(LOOK)
def loss_curves(curves: Mapping[str, Curve], reference: str, highlighted: Sequence[str]) -> Figure:
    """Held-out loss by tokens, and its distance from a reference's, bands of one standard error.

    Args:
        curves: By contender, the best first: tokens [S], and losses [S] by seed.
        reference: What the second panel holds the others against, over the seeds that both have.
        highlighted: Contenders that get a colour.

    Returns:
        A figure; of one panel if the reference has no curve.
    """
    looks = styles(list(curves), highlighted)
    paired = _differences(curves, reference)
    figure = Figure(figsize=(11 if paired else 7, 4.8), dpi=120, layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, 2 if paired else 1))
    _draw_curves(axes[0], {name: (x, list(y.values())) for name, (x, y) in curves.items()}, looks)
    axes[0].set_ylabel("held-out loss, nats a token")
    if paired:
        _draw_curves(axes[1], paired, looks)
        axes[1].axhline(0, color=looks[reference].colour, linewidth=1.5)
        axes[1].set_ylabel(f"held-out loss minus that of {reference}, nats a token")
    ends = {name: _last(list(y.values())) for name, (_, y) in curves.items()}
    best = min(ends, key=lambda name: ends[name] if math.isfinite(ends[name]) else math.inf)
    tokens = max(float(x[-1]) for x, _ in curves.values())
    against = f"; {reference} {ends[reference]:.3f}" if paired and best != reference else ""
    figure.suptitle(
        f"After {tokens:,.0f} tokens {best} has the lowest held-out loss: {ends[best]:.3f} nats "
        f"a token{against} (bands: standard error over seeds)",
        fontsize=10,
    )
    return figure


def _differences(curves: Mapping[str, Curve], reference: str) -> dict[str, Any]:
    if reference not in curves:
        return {}
    tokens, theirs = curves[reference]
    found = {}
    for name, (x, ours) in curves.items():
        pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        if name != reference and pairs and np.array_equal(x, tokens):
            found[name] = (x, pairs)
    return found


def _last(losses: Sequence[np.ndarray]) -> float:
    return float(np.mean([loss[-1] for loss in losses]))


def _draw_curves(axis: Axes, curves: Mapping[str, Any], looks: Mapping[str, Style]) -> None:
    """Lines with bands; limits leave out curves that are far from the others."""
    last = {name: _last(y) for name, (_, y) in curves.items()}
    low, high = robust_limits([float(v) for _, y in curves.values() for v in np.mean(y, axis=0)])
    for name, (x, y) in curves.items():
        look, mean = looks[name], np.mean(y, axis=0)
        order = 3 if look.front else 2
        axis.plot(
            x / 1e6,
            mean,
            color=look.colour,
            marker=look.marker if look.front else None,
            markersize=4,
            linewidth=1.6 if look.front else 1,
            zorder=order,
        )
        if look.front and len(y) > 1:
            error = np.std(y, axis=0, ddof=1) / math.sqrt(len(y))
            axis.fill_between(
                x / 1e6, mean - error, mean + error, color=look.colour, alpha=0.2, linewidth=0
            )
    axis.set_ylim(low, high)
    axis.set_xlabel("training tokens, millions")
    label_ends(axis, last, looks)


@mpl.rc_context(LOOK)
def final_losses(
    losses: Mapping[str, Sequence[float]], reference: str, highlighted: Sequence[str]
) -> Figure:
    """Final held-out loss of each contender: seeds, mean and its standard error.

    Args:
        losses: By contender, in the order to draw: one a seed.
        reference: Gets a line through its mean.
        highlighted: Contenders that get a colour.

    Returns:
        A figure.
    """
    figure, axis = _row_figure(len(losses))
    dots = [
        Dot(name, float(np.mean(values)), _standard_error(values), points=values)
        for name, values in losses.items()
    ]
    draw_dots(axis, dots, styles(list(losses), highlighted))
    best = dots[0]
    title = f"{best.name} ends lowest: {best.centre:.3f} nats a token"
    if reference in losses:
        mean = float(np.mean(losses[reference]))
        axis.axvline(mean, color="0.3", linestyle="--", linewidth=1, zorder=1)
        better = sum(dot.centre < mean for dot in dots)
        title += f"; {better} of {len(dots) - 1} others end below {reference} (dashed)"
    axis.set_xlabel("held-out loss after training, nats a token; rings: seeds, bar: standard error")
    figure.suptitle(title, fontsize=10)
    return figure


@mpl.rc_context(LOOK)
def paired_differences(
    rows: Sequence[Mapping[str, Any]], reference: str, highlighted: Sequence[str]
) -> Figure:
    """Differences of the final loss to a reference over the seeds that both have.

    Args:
        rows: From `paired_rows`, those against the reference that have a difference.
        reference: Named in the title.
        highlighted: Contenders that get a colour.

    Returns:
        A figure: thick bars of one standard error, thin ones of 95 % by Student's t.
    """
    figure, axis = _row_figure(len(rows))
    dots = []
    for row in sorted(rows, key=lambda row: row["loss_difference"]):
        error = row["loss_stderr"]
        wide = error and error * float(stats.t.ppf(0.975, row["loss_pairs"] - 1))
        dots.append(Dot(row["contender"], row["loss_difference"], error, wide))
    draw_dots(axis, dots, styles([dot.name for dot in dots], highlighted))
    axis.axvline(0, color="0.3", linestyle="--", linewidth=1, zorder=1)
    known = [row for row in rows if row["loss_p"] is not None and row["loss_p"] < SIGNIFICANT]
    below = sum(row["loss_difference"] < 0 for row in known)
    axis.set_xlabel(
        f"final held-out loss minus that of {reference}, nats a token\n"
        "thick: standard error, thin: 95 % interval, over seeds that both have"
    )
    figure.suptitle(
        f"Of {len(rows)} contenders {below} end below {reference} and {len(known) - below} above "
        f"it at p < {SIGNIFICANT} (paired, not corrected for their number)",
        fontsize=10,
    )
    return figure


@mpl.rc_context(LOOK)
def accuracies(
    by_task: Mapping[str, Mapping[str, tuple[float, float]]], highlighted: Sequence[str]
) -> Figure:
    """Accuracy of each contender in each task, a panel a task.

    Args:
        by_task: By contender and task: mean over seeds, and the error of its questions.
        highlighted: Contenders that get a colour.

    Returns:
        A figure.
    """
    names, tasks = list(by_task), list(next(iter(by_task.values())))
    means = {name: np.mean([by_task[name][task][0] for task in tasks]) for name in names}
    names.sort(key=lambda name: -means[name])
    looks, columns = styles(names, highlighted), min(4, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    size = (2.4 * columns + 2, lines * (1.2 + 0.19 * len(names)))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for i, axis in enumerate(axes.flat):
        if i >= len(tasks):
            axis.remove()
            continue
        found = [by_task[name][tasks[i]] for name in names]
        dots = [
            Dot(name, 100 * mean, 100 * error)
            for name, (mean, error) in zip(names, found, strict=True)
        ]
        draw_dots(axis, dots, looks, named=i % columns == 0)
        axis.set_title(tasks[i])
        axis.set_xlabel("accuracy, %")
    errors = [
        math.hypot(*(error for _, error in of_one.values())) / len(tasks)
        for of_one in by_task.values()
    ]
    spread = 100 * (max(means.values()) - min(means.values()))
    figure.suptitle(
        f"Mean accuracy: {names[0]} {100 * means[names[0]]:.1f} %, all within {spread:.1f} points; "
        f"one standard error of a mean is {100 * max(errors):.1f} points (bars: of the questions)",
        fontsize=10,
    )
    return figure


def _row_figure(rows: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.5, 1.3 + 0.24 * rows), dpi=120, layout="constrained")
    return figure, figure.subplots()


def _standard_error(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
