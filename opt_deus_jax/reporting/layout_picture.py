"""The picture of a method: which layers are new, from whom, and what training touches."""

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch

from opt_deus_jax.reporting.drawing import write_title
from opt_deus_jax.reporting.plots import COLOURS, LOOK
from opt_deus_jax.upscaling.layout import LayerOrigin
from opt_deus_jax.upscaling.methods import Method

_FROZEN, _NEW, _TRAINED = "0.82", COLOURS[0], COLOURS[5]
_BASE_ROW, _GROWN_ROW, _HEIGHT = 0.0, 1.35, 0.36
# What the kernels of a new layer are, from its parents A (below) and B (above), and from whom.
_MADE = {
    "transport": ("(TA + B) / 2", "AB"),
    "average": ("(A + B) / 2", "AB"),
    "copy_previous": ("A", "A"),
    "copy_next": ("B", "B"),
    "half_next": ("B / 2", "B"),
    "random": ("random", ""),
    "predicted": ("f(A, B)", "AB"),
}


def draw_layout(
    name: str,
    layers: Sequence[LayerOrigin],
    is_trained: Sequence[bool],
    method: Method,
) -> Figure:
    """Draws base and grown model side by side, a box a layer, and the kernels of a new layer.

    Args:
        name: Of the base.
        layers: From `plan_layers`.
        is_trained: For each layer, whether anything of it is trained.
        method: How new layers are made.

    Returns:
        The figure.
    """
    num_new, first = sum(layer.is_new for layer in layers), _first(is_trained)
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(11, 3.6), dpi=120, layout="constrained")
        has_block = method.weights in _MADE
        left, right = figure.subplots(1, 2, width_ratios=(3.6, 1 if has_block else 0.01))
        _draw_layers(left, layers, is_trained, _MADE.get(method.weights, ("", ""))[1])
        _draw_passes(left, first, len(layers))
        right.set_axis_off()
        if has_block:
            _draw_block(right, method)
        what = "all layers are trained" if all(is_trained) else f"{sum(is_trained)} are trained"
        write_title(
            figure,
            f"{name} grows to {len(layers)} layers: {num_new} are new ({method.layout}), {what}"
            + (f", and a step keeps no activations of the lowest {first}" if first else ""),
        )
    return figure


def _first(is_trained: Sequence[bool]) -> int:
    return next((depth for depth, trained in enumerate(is_trained) if trained), len(is_trained))


def _box(axis: Axes, x: float, y: float, colour: str, width: float = 0.8, height: float = _HEIGHT):
    axis.add_patch(
        FancyBboxPatch(
            (x - width / 2, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=colour,
            edgecolor="none",
            mutation_aspect=0.25,
        )
    )


def _parents(layer: LayerOrigin, used: str) -> list[int]:
    if layer.base_layer is not None:
        return [layer.base_layer]
    previous, next_ = layer.previous, layer.next if layer.next is not None else layer.previous
    wanted = (previous if "A" in used else None, next_ if "B" in used else None)
    return [parent for parent in wanted if parent is not None]


def _draw_layers(
    axis: Axes, layers: Sequence[LayerOrigin], is_trained: Sequence[bool], used: str
) -> None:
    base = sorted({layer.base_layer for layer in layers} - {None}, key=lambda layer: layer or 0)
    shift = (len(layers) - len(base)) / 2
    for place, number in enumerate(base):
        _box(axis, place + shift, _BASE_ROW, _FROZEN)
        axis.text(place + shift, _BASE_ROW - 0.12, f"{number}", ha="center", va="top", fontsize=6)
    places = {number: place + shift for place, number in enumerate(base)}
    for layer, trained in zip(layers, is_trained, strict=True):
        colour = _NEW if layer.is_new else _TRAINED if trained else _FROZEN
        _box(axis, layer.depth, _GROWN_ROW, colour)
        for parent in _parents(layer, used):
            axis.plot(
                [places[parent], layer.depth],
                [_BASE_ROW + _HEIGHT + 0.03, _GROWN_ROW - 0.03],
                color=_NEW if layer.is_new else "0.75",
                linewidth=1.1 if layer.is_new else 0.7,
                zorder=2 if layer.is_new else 1,
            )
    axis.text(-1.2, _BASE_ROW + _HEIGHT / 2, "base", ha="right", va="center")
    axis.text(-1.2, _GROWN_ROW + _HEIGHT / 2, "grown", ha="right", va="center")
    axis.set_xlim(-5, len(layers))
    axis.set_ylim(-0.75, 2.5)
    axis.set_axis_off()
    looks = {"base layer, as it was": _FROZEN, "new layer, trained": _NEW}
    if any(t and not layer.is_new for layer, t in zip(layers, is_trained, strict=True)):
        looks["base layer, trained"] = _TRAINED
    axis.legend(
        handles=[Patch(color=colour, label=label) for label, colour in looks.items()],
        loc="lower center",
        ncols=3,
        frameon=False,
    )


def _draw_passes(axis: Axes, first: int, depth: int) -> None:
    y = _GROWN_ROW + _HEIGHT + 0.22
    spans = [(0, first, "forward only", "0.5"), (first, depth, "forward and backward", _NEW)]
    for start, end, text, colour in spans:
        if end > start:
            axis.plot([start - 0.4, end - 0.6], [y, y], color=colour, linewidth=2.5)
            axis.text((start + end - 1) / 2, y + 0.1, text, ha="center", va="bottom", fontsize=8)


def _draw_block(axis: Axes, method: Method) -> None:
    made, _ = _MADE[method.weights]
    end = "0" if method.zero_init else made
    rows = {
        0.62: (("q", made), ("k", made), ("v", made), ("o", end)),
        0.22: (("gate", made), ("up", made), ("down", end)),
    }
    for y, kernels in rows.items():
        for place, (kernel, content) in enumerate(kernels):
            x = place + (0 if kernel != "down" else 1)
            is_zero = content == "0"
            _box(axis, x, y, "white" if is_zero else _NEW, 0.84, 0.2)
            if is_zero:
                axis.text(x, y + 0.1, "0", ha="center", va="center", fontsize=9)
                axis.plot(
                    [x - 0.42, x + 0.42, x + 0.42, x - 0.42, x - 0.42],
                    [y, y, y + 0.2, y + 0.2, y],
                    color=_NEW,
                    linewidth=1.2,
                )
            axis.text(x, y + 0.22, kernel, ha="center", va="bottom", fontsize=8)
    axis.text(1.5, 0.96, "kernels of a new layer", ha="center", va="bottom", fontsize=9)
    axis.text(1.5, 0.14, f"filled: {made}", ha="center", va="top", fontsize=8)
    if method.weights == "transport":
        axis.text(
            *(1.5, 0.04, "A below, B above; T lays A's\nneurons on B's: optimal transport"),
            ha="center",
            va="top",
            fontsize=7,
            color="0.35",
        )
    axis.set_xlim(-0.6, 3.6)
    axis.set_ylim(-0.12, 1.08)
