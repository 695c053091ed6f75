"""Pictures of what lies behind a comparison: learning rates, step times, diagnostics."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from opt_deus_jax.reporting.drawing import label_ends, robust_limits, styles, write_title
from opt_deus_jax.reporting.plots import COLOURS, LOOK


@mpl.rc_context(LOOK)
def learning_rates(rows: Sequence[Mapping[str, Any]], highlighted: Sequence[str]) -> Figure:
    """Held-out loss of the sweeps by learning rate; the chosen ones are filled.

    Args:
        rows: From `sweep_rows`.
        highlighted: Contenders that get a colour.

    Returns:
        A figure.
    """
    looks = styles([row["contender"] for row in rows], highlighted)
    height = max(4.8, 1.6 + 0.16 * len(rows))
    figure = Figure(figsize=(8, height), dpi=120, layout="constrained")
    axis = figure.subplots()
    for row in rows:
        look, losses = looks[row["contender"]], row["losses"]
        drawn: dict[str, Any] = {"color": look.colour, "marker": look.marker}
        drawn |= {"zorder": 3 if look.front else 2, "linewidth": 1.4 if look.front else 1.0}
        axis.plot(*zip(*losses.items(), strict=True), markersize=4, markerfacecolor="w", **drawn)
        axis.plot([row["chosen"]], [losses[row["chosen"]]], markersize=6, **drawn)
    axis.set_xscale("log")
    rates = sorted({rate for row in rows for rate in row["losses"]})
    axis.set_xticks(rates, [f"{rate:.3g}" for rate in rates], rotation=45)
    axis.minorticks_off()
    axis.set_xlabel("peak learning rate (filled: chosen)")
    axis.set_ylabel("held-out loss of the trial, nats a token")
    axis.set_ylim(*robust_limits([loss for row in rows for loss in row["losses"].values()]))
    axis.margins(x=0.02)
    ends = {row["contender"]: list(row["losses"].items())[-1] for row in rows}
    label_ends(axis, ends, looks, inches=height - 1.4)
    edges = [row["contender"] for row in rows if row["at_edge"]]
    found = f"is inside of what was tried for all {len(rows)} contenders"
    if edges:
        found = f"lies at the edge of what was tried for {len(edges)} of {len(rows)} contenders"
    write_title(figure, f"The best learning rate {found}")
    return figure


@mpl.rc_context(LOOK)
def step_times(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Step time beside FLOPs of each contender, over those of the one at the top.

    Args:
        rows: From `step_rows`, those with both ratios that are not held against themselves.

    Returns:
        A figure.
    """
    rows = sorted(rows, key=lambda row: row["times"])
    figure = Figure(figsize=(7.5, 1.6 + 0.4 * len(rows)), dpi=120, layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(rows))
    for shift, field, label, colour in (
        (-0.19, "times", "measured time of a step", COLOURS[0]),
        (0.19, "times_by_flops", "FLOPs of a step", COLOURS[4]),
    ):
        values = [row[field] for row in rows]
        bars = axis.barh(places + shift, values, 0.36, color=colour, label=label)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axis.axvline(1, color="0.3", linestyle="--", linewidth=1)
    labels = [f"{row['contender']} ({row['layout']})\nover {row['held_against']}" for row in rows]
    axis.set_yticks(places, labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("times that of the same weights at the top")
    axis.margins(x=0.12)
    axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    placed = [row["times"] for row in rows if row["layout"] not in ("none", "stack")]
    other = [row["times"] for row in rows if row["layout"] in ("none", "stack")]
    found = [
        f"{min(times):.2f} to {max(times):.2f} with {what}"
        for what, times in (("new layers elsewhere", placed), ("everything trained", other))
        if times
    ]
    write_title(figure, f"Times as long as with new layers at the top: {', '.join(found)}")
    return figure


@mpl.rc_context(LOOK)
def diagnostics_against_outcome(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Final loss by each diagnostic of the transport.

    Args:
        rows: From `diagnostics_rows`, those with a loss.

    Returns:
        A figure of three panels.
    """
    names = [row["contender"] for row in rows]
    looks = styles(names, names)
    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    panels = (
        ("match_gain", "matched cost / mean cost"),
        ("effective_sources", "sources a neuron"),
        ("norm_ratio_next", "norm of fused / norm of B"),
    )
    axes = figure.subplots(1, 3, sharey=True)
    found = []
    for axis, (field, label) in zip(axes, panels, strict=True):
        for row in rows:
            look = looks[row["contender"]]
            axis.errorbar(
                *(row[field], row["loss"]),
                yerr=row["loss_stderr"],
                fmt=look.marker,
                color=look.colour,
                label=row["contender"],
            )
        axis.set_xlabel(f"{label}, mean over matrices")
        axis.margins(0.12)
        values = [row[field] for row in rows]
        if len(set(values)) > 1 and len(rows) > 2:
            rank = float(stats.spearmanr(values, [row["loss"] for row in rows])[0])  # pyright: ignore
            found.append(f"{rank:+.2f} with {label}" if math.isfinite(rank) else "")
    axes[0].set_ylabel("final held-out loss, nats a token")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    ranks = ", ".join(filter(None, found))
    said = f"Rank correlation of the final loss: {ranks}" if ranks else "Final loss by diagnostic"
    write_title(figure, f"{said} ({len(rows)} contenders)")
    return figure
