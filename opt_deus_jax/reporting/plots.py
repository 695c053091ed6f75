"""Pictures: one look, readable in print and by the colour-blind."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from scipy import sparse

from opt_deus_jax.transport.diagnostics import MapPicture, MatrixReport, picture_of

# Okabe and Ito's palette.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PICTURE = "diagnostics.png"
LOOK: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "font.size": 9,
}


def png(figure: Figure) -> bytes:
    """A figure as PNG, as a notebook shows it; the same bytes for the same figure."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": ""})
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(figure))


def plot_diagnostics(
    directory: Path,
    pictures: Mapping[str, MapPicture],
    reports: Mapping[int, Sequence[MatrixReport]],
) -> None:
    """Draws transport maps of the first new layer and the reports of all of them.

    Args:
        directory: Gets `diagnostics.png`.
        pictures: Transport maps by matrix, of the first fused layer.
        reports: Reports by depth.
    """
    first_depth = next(iter(reports))
    # Layers with experts and others have different ones.
    names = list(dict.fromkeys(report.name for each in reports.values() for report in each))
    wanted = ("query", "output", "router") if "router" in pictures else ("query", "gate", "up")
    shown = [name for name in wanted if name in pictures]
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(11, 7.2), dpi=120, layout="constrained")
        axes = figure.subplots(2, 3)
        for axis, name in zip(axes[0], shown, strict=True):
            title = f"{name}, layer {first_depth}"
            _draw_map(axis, pictures[name], title, ", sorted by match")
        panels = (
            ("match_gain", "matched cost / mean cost", "below 1: the match finds alike neurons"),
            ("effective_sources", "sources a neuron", "1: a permutation; more: neurons mix"),
            ("norm_ratio_next", "norm of fused / norm of B", "below 1: fusion shrinks kernels"),
        )
        for axis, (field, label, title) in zip(axes[1], panels, strict=True):
            columns = [
                [getattr(r, field) for each in reports.values() for r in each if r.name == name]
                for name in names
            ]
            axis.bar(names, [np.mean(column) for column in columns], color=COLOURS[0], alpha=0.8)
            for i, column in enumerate(columns):
                axis.plot([i] * len(column), column, ".", color=COLOURS[1], markersize=4)
            axis.set_ylabel(label)
            axis.set_title(title)
            axis.tick_params(axis="x", rotation=60)
        figure.suptitle(
            f"Transport of A's neurons onto B's, new layers: {len(reports)} "
            "(bars: mean, dots: layers)"
        )
        save(figure, directory / PICTURE)


@mpl.rc_context(LOOK)
def sorting_figure(
    maps: Mapping[str, np.ndarray | sparse.csr_array],
    reports: Mapping[int, Sequence[MatrixReport]],
) -> Figure:
    """Draws transport maps of the first new layer before and after B's neurons are sorted by match.

    Args:
        maps: Transport maps [m, n] by matrix, of the first fused layer; signs are not drawn.
        reports: Reports by depth.

    Returns:
        A figure. Any map has its diagonal once it is sorted, so the title gives the cost too.
    """
    depth = next(iter(reports))
    shown = [report for report in reports[depth] if report.name in ("query", "gate", "up")]
    figure = Figure(figsize=(11, 7.2), dpi=120, layout="constrained")
    axes = figure.subplots(2, len(shown), squeeze=False)
    for column, report in zip(axes.T, shown, strict=True):
        map_MN, as_it_is = maps[report.name], tuple(range(len(report.match_order)))
        unsorted, sorted_ = (picture_of(map_MN, o) for o in (as_it_is, report.match_order))
        _draw_map(column[0], unsorted, f"{report.name}, layer {depth}, as it is", "")
        gain = f"matched cost / mean cost: {report.match_gain:.2f}"
        _draw_map(column[1], sorted_, gain, ", sorted by match")
    gains = [report.match_gain for report in shown]
    figure.suptitle(
        "Sorting by match shows one diagonal whatever the match is worth: here matched neurons are "
        f"at {min(gains):.2f} to {max(gains):.2f} of the mean distance",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    return figure


def _draw_map(axis, picture: MapPicture, title: str, order: str) -> None:
    rows, columns = picture.shape
    floor = max(float(picture.mass.max()) * 1e-4, 1e-12)
    image = axis.imshow(
        np.maximum(picture.mass, floor),
        norm=LogNorm(floor, picture.mass.max()),
        cmap="cividis",
        extent=(0, columns, rows, 0),
        aspect="auto",
        interpolation="nearest",
    )
    axis.set_title(title)
    axis.set_xlabel(f"neuron of B{order}")
    axis.set_ylabel("neuron of A")
    axis.figure.colorbar(image, ax=axis, label="mass")


def plot_losses(
    path: Path, metrics: Sequence[Mapping[str, float]], held_out: Sequence[tuple[int, float]]
) -> None:
    """Draws the training loss and the held-out loss, which starts at the untrained model's.

    Args:
        path: The PNG to write.
        metrics: Lines of `metrics.jsonl`; those with a "loss" are drawn, nats a token.
        held_out: (step, held-out loss, nats a token), the first before training.
    """
    trained = [line for line in metrics if "loss" in line]
    steps, losses = [line["step"] for line in trained], [line["loss"] for line in trained]
    held_out_steps, held_out_losses = zip(*held_out, strict=True)
    fall = held_out_losses[0] - held_out_losses[-1]
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
        axis = figure.subplots()
        axis.plot(steps, losses, color=COLOURS[5], linewidth=1, label="training text")
        axis.plot(held_out_steps, held_out_losses, "o-", color=COLOURS[0], label="held-out text")
        axis.axhline(
            held_out_losses[0], color=COLOURS[1], linestyle="--", label="held out, before training"
        )
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("cross-entropy, nats a token")
        verb = "fell" if fall >= 0 else "rose"
        axis.set_title(f"Held-out loss {verb} by {abs(fall):.2f} nats a token")
        axis.legend(frameon=False)
        save(figure, path)
