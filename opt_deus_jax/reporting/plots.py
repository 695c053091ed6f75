"""Pictures: one look, readable in print and by the colour-blind."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from scipy import sparse

if TYPE_CHECKING:
    # ott-jax takes a second to import.
    from opt_deus_jax.transport.diagnostics import MatrixReport

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


def _pooled(matrix_MN: np.ndarray, size: int) -> np.ndarray:
    """Sums mass in at most size x size tiles, so that thin entries do not vanish in a picture."""
    for axis in (0, 1):
        length = matrix_MN.shape[axis]
        if length > size:
            starts = np.linspace(0, length, size, endpoint=False).astype(int)
            matrix_MN = np.add.reduceat(matrix_MN, starts, axis=axis)
    return matrix_MN


def plot_diagnostics(
    directory: Path,
    maps: Mapping[str, np.ndarray | sparse.csr_array],
    reports: Mapping[int, Sequence[MatrixReport]],
) -> None:
    """Draws transport maps of the first new layer and the reports of all of them.

    Args:
        directory: Gets `diagnostics.png`.
        maps: Transport maps [m, n] by matrix, of the first fused layer; signs are not drawn.
        reports: Reports by depth.
    """
    first_depth = next(iter(reports))
    names = [report.name for report in reports[first_depth]]
    order = {report.name: report.match_order for report in reports[first_depth]}
    shown = [name for name in ("query", "gate", "up") if name in maps]
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(11, 7.2), dpi=120, layout="constrained")
        axes = figure.subplots(2, 3)
        for axis, name in zip(axes[0], shown, strict=True):
            _draw_map(
                axis, _dense(maps[name]), np.asarray(order[name]), f"{name}, layer {first_depth}"
            )
        panels = (
            ("match_gain", "matched cost / mean cost", "below 1: the match finds alike neurons"),
            ("effective_sources", "sources a neuron", "1: a permutation; more: neurons mix"),
            ("norm_ratio_next", "norm of fused / norm of B", "below 1: fusion shrinks kernels"),
        )
        for axis, (field, label, title) in zip(axes[1], panels, strict=True):
            values = [[getattr(r, field) for r in reports[depth]] for depth in reports]
            mean = np.mean(values, axis=0)
            axis.bar(names, mean, color=COLOURS[0], alpha=0.8)
            for i, column in enumerate(np.asarray(values).T):
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
        map_MN, match = _dense(maps[report.name]), np.asarray(report.match_order)
        _draw_map(column[0], map_MN, None, f"{report.name}, layer {depth}, as it is")
        _draw_map(column[1], map_MN, match, f"matched cost / mean cost: {report.match_gain:.2f}")
    gains = [report.match_gain for report in shown]
    figure.suptitle(
        "Sorting by match shows one diagonal whatever the match is worth: here matched neurons are "
        f"at {min(gains):.2f} to {max(gains):.2f} of the mean distance",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    return figure


def _dense(map_MN: np.ndarray | sparse.csr_array) -> np.ndarray:
    return np.abs(map_MN if isinstance(map_MN, np.ndarray) else map_MN.toarray())


def _draw_map(axis, map_MN: np.ndarray, match: np.ndarray | None, title: str) -> None:
    # B's neurons sorted by the A neuron that each matches best: a good match is a diagonal.
    order = slice(None) if match is None else np.argsort(match, kind="stable")
    pooled = _pooled(map_MN[:, order], 192)
    floor = max(float(pooled.max()) * 1e-4, 1e-12)
    image = axis.imshow(
        np.maximum(pooled, floor),
        norm=LogNorm(floor, pooled.max()),
        cmap="cividis",
        extent=(0, map_MN.shape[1], map_MN.shape[0], 0),
        aspect="auto",
        interpolation="nearest",
    )
    axis.set_title(title)
    axis.set_xlabel("neuron of B" if match is None else "neuron of B, sorted by match")
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
