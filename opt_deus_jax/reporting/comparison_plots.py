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
    write_title,
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
    losses = {name: (x, np.stack(list(y.values()))) for name, (x, y) in curves.items()}
    paired = _differences(curves, reference)
    height = max(4.8, 1.6 + 0.16 * len(curves))
    figure = Figure(figsize=(12 if paired else 8, height), dpi=120, layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, 2 if paired else 1))
    named = [name for name in losses if looks[name].front or not paired]
    _draw_curves(axes[0], losses, looks, named)
    axes[0].set_ylabel("held-out loss, nats a token")
    if paired:
        axes[1].axhline(0, color=looks[reference].colour, linewidth=1.6)
        _draw_curves(axes[1], paired, looks, list(paired))
        low, high = axes[1].get_ylim()
        margin = 0.05 * (high - low)
        axes[1].set_ylim(min(low, -margin), max(high, margin))
        axes[1].set_ylabel(f"held-out loss minus that of {reference}, nats a token")
    last = {name: float(y[:, -1].mean()) for name, (_, y) in losses.items()}
    best = next(iter(curves))
    tokens = max(float(x[-1]) for x, _ in curves.values())
    against = f"; {reference} {last[reference]:.4f}" if paired and best != reference else ""
    banded = any(len(losses[name][1]) > 1 for name in losses if looks[name].front)
    write_title(
        figure,
        f"After {tokens:,.0f} tokens {best} has the lowest held-out loss: {last[best]:.4f} nats "
        f"a token{against} ({'bands: standard error over seeds' if banded else 'one seed'})",
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
            found[name] = (x, np.stack(pairs))
    return found


def _draw_curves(
    axis: Axes,
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    looks: Mapping[str, Style],
    named: Sequence[str],
) -> None:
    """Lines with bands; limits leave out what is far, and curves that end far from the others."""
    means = {name: y_RS.mean(axis=0) for name, (_, y_RS) in curves.items()}
    is_long = max(float(x_S[-1]) for x_S, _ in curves.values()) >= 1e6
    unit, unit_name = (1e6, "millions") if is_long else (1e3, "thousands")
    low, high = robust_limits([float(mean[-1]) for mean in means.values()])
    # Of those with a colour, what is far better than the others is what the picture is about.
    near = [n for n, y in means.items() if y[-1] <= high and (looks[n].front or y[-1] >= low)]
    near = near or list(means)
    extents = [float(value) for name in near for value in means[name]]
    for name, (x_S, y_RS) in curves.items():
        look, mean_S, tokens_S = looks[name], means[name], x_S / unit
        marker, width, order = (look.marker, 1.6, 3) if look.front else (None, 1.0, 2)
        drawn: dict[str, Any] = {"color": look.colour, "marker": marker, "markersize": 4}
        axis.plot(tokens_S, mean_S, linewidth=width, zorder=order, **drawn)
        if look.front and len(y_RS) > 1:
            error_S = np.std(y_RS, axis=0, ddof=1) / math.sqrt(len(y_RS))
            band = mean_S - error_S, mean_S + error_S
            axis.fill_between(tokens_S, *band, color=look.colour, alpha=0.2, linewidth=0)
            extents += [float(value) for edge in band for value in edge if name in near]
    axis.set_ylim(*robust_limits(extents))
    axis.margins(x=0.01)
    axis.set_xlabel(f"training tokens, {unit_name}")
    ends = {name: (curves[name][0][-1] / unit, float(means[name][-1])) for name in named}
    label_ends(axis, ends, looks, inches=max(3.4, 0.2 + 0.16 * len(curves)))


@mpl.rc_context(LOOK)
def final_losses(
    rows: Sequence[Mapping[str, Any]],
    losses: Mapping[str, Sequence[float]],
    paired: Sequence[Mapping[str, Any]],
    reference: str,
    highlighted: Sequence[str],
) -> Figure:
    """Final held-out loss of each contender: seeds, mean and its standard error.

    Args:
        rows: From `contender_rows`, those with a final loss, in the order to draw.
        losses: By contender, one a seed.
        paired: From `paired_rows`, those against the reference that have a difference. Orders of
            the text differ more than contenders do, so means over other seeds tell no order.
        reference: Gets a line through its mean.
        highlighted: Contenders that get a colour.

    Returns:
        A figure.
    """
    figure, axis = _row_figure(len(rows))
    dots = [
        Dot(name, row["loss_100"], row["loss_stderr"], points=losses[name])
        for row in rows
        for name in (row["contender"],)
    ]
    draw_dots(axis, dots, styles(list(losses), highlighted))
    best = dots[0]
    title = f"{best.name} ends lowest: {best.centre:.4f} nats a token"
    if reference in losses:
        mean = next(dot.centre for dot in dots if dot.name == reference)
        axis.axvline(mean, color="0.3", linestyle="--", linewidth=1, zorder=1)
        better = sum(row["loss_difference"] < 0 for row in paired)
        others = f"{len(paired)} other{'s' * (len(paired) > 1)}"
        title += (
            f"; by the seeds that both have {better} of {others} end below {reference} (dashed)"
        )
    axis.set_xlabel("held-out loss after training, nats a token; rings: seeds, bar: standard error")
    write_title(figure, title)
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
    for row in sorted(rows, key=_ranked):
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
    write_title(
        figure,
        f"Of {len(rows)} other{'s' * (len(rows) > 1)} {below} end{'s' * (below == 1)} below "
        f"{reference} and {len(known) - below} above it at p < {SIGNIFICANT} (paired, uncorrected)",
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
    panels = {task: {} for task in ("mean of tasks", *next(iter(by_task.values())))}
    for name, tasks in by_task.items():
        error = math.hypot(*(error for _, error in tasks.values())) / len(tasks)
        mean = float(np.mean([accuracy for accuracy, _ in tasks.values()]))
        for task, (centre, width) in ({"mean of tasks": (mean, error)} | dict(tasks)).items():
            panels[task][name] = Dot(name, 100 * centre, 100 * width)
    means = panels["mean of tasks"]
    names = sorted(means, key=lambda name: -means[name].centre)
    looks, columns = styles(names, highlighted), min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = (2.4 * columns + 2, lines * (1.2 + 0.19 * len(names)))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for i, (task, dots) in enumerate(panels.items()):
        axis = axes.flat[i]
        draw_dots(axis, [dots[name] for name in names], looks, named=i % columns == 0)
        axis.set_title(task)
        axis.set_xlabel("accuracy, %")
    spread = means[names[0]].centre - means[names[-1]].centre
    error = max(dot.error for dot in means.values())
    write_title(
        figure,
        f"Mean accuracy: {names[0]} {means[names[0]].centre:.1f} %, all within {spread:.1f} "
        f"points; one standard error of a mean is {error:.1f} points (bars: of the questions)",
    )
    return figure


def _row_figure(rows: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.5, 1.3 + 0.24 * rows), dpi=120, layout="constrained")
    return figure, figure.subplots()


def _ranked(row: Mapping[str, Any]) -> float:
    difference = row["loss_difference"]
    return math.inf if math.isnan(difference) else difference
