"""Pictures: one look, readable in print and by the colour-blind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

if TYPE_CHECKING:
    # ott-jax takes a second to import.
    from opt_deus_jax.transport.diagnostics import MapPicture, MatrixReport

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


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, the same bytes for the same figure; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": ""})


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
            _draw_map(axis, pictures[name], f"{name}, layer {first_depth}")
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
            f"Transport of A's neurons onto B's, {len(reports)} new layers "
            "(bars: mean, dots: layers)"
        )
        save(figure, directory / PICTURE)


def _draw_map(axis, picture: MapPicture, title: str) -> None:
    # B's neurons are sorted by the A neuron that each matches best: a good match is a diagonal.
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
    axis.set_xlabel("neuron of B, sorted by match")
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
