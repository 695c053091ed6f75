"""Pictures of a mesh: where parameters lie, and what a compiled step takes of a chip."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from jax.sharding import Mesh
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from opt_deus_jax.distributed.compiled_report import CompiledReport
from opt_deus_jax.distributed.sharding import named_sharding
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.params import ParamSpec, block_specs, outer_specs
from opt_deus_jax.reporting.drawing import write_title
from opt_deus_jax.reporting.plots import COLOURS, LOOK

# More numbers than these cannot be read in a panel.
_LABELLED_PARTS = 16
_COLUMNS = 5


@mpl.rc_context(LOOK)
def sharding_figure(config: ModelConfig, mesh: Mesh, batch: tuple[int, int]) -> Figure:
    """Draws which chip holds which part of each kernel and of a batch, by the sharding table.

    Args:
        config: The grown network, with its depth.
        mesh: The mesh; its devices need not exist.
        batch: Sequences a step, and tokens a sequence.

    Returns:
        A figure: a panel an array, rectangles its parts, numbers and colours the chips.
    """
    specs = {**block_specs(config), **outer_specs(config)}
    arrays: dict[str, tuple[tuple[int, int], tuple[str, ...]]] = {
        name.removesuffix("_kernel"): ((spec.shape[0], spec.shape[1]), spec.logical_axes)
        for name, spec in specs.items()
        if len(spec.shape) == 2
    }
    arrays["batch"] = (batch, ("batch", "length"))
    lines = -(-len(arrays) // _COLUMNS)
    figure = Figure(figsize=(11, 0.8 + 2.7 * lines), dpi=120, layout="constrained")
    axes = figure.subplots(lines, _COLUMNS, squeeze=False)
    colours = ScalarMappable(Normalize(0, max(mesh.size - 1, 1)), "cividis")
    for axis, (name, (shape, logical_axes)) in zip(axes.flat, arrays.items(), strict=False):
        _draw_parts(axis, _parts(mesh, shape, logical_axes), shape, colours)
        axis.set_title(name)
        is_batch = name == "batch"
        axis.set_ylabel("sequence" if is_batch else "row (out)")
        axis.set_xlabel("token" if is_batch else "column (in)")
    for axis in axes.flat[len(arrays) :]:
        axis.remove()
    drawn = list(axes.flat[: len(arrays)])
    label = "chip (the first that holds a part)"
    figure.colorbar(colours, ax=drawn, label=label, shrink=0.6, ticks=MaxNLocator(integer=True))
    total, held = _held(config, mesh)
    numbered = " (numbers: the chips that hold a part)" if any(a.texts for a in drawn) else ""
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    write_title(
        figure,
        f"Mesh {sizes}: each of {mesh.size} chips holds {held / total:.1%} of the "
        f"{total / 1e6:,.0f}M parameters{numbered}",
    )
    return figure


def _parts(
    mesh: Mesh, shape: tuple[int, ...], logical_axes: tuple[str, ...]
) -> dict[tuple[tuple[int, int], ...], list[int]]:
    """Ranges of an array along its axes, and the chips that hold them."""
    numbers = {device: number for number, device in enumerate(mesh.devices.flat)}
    parts: dict[tuple[tuple[int, int], ...], list[int]] = {}
    indices = named_sharding(mesh, *logical_axes).devices_indices_map(shape)
    for device, index in sorted(indices.items(), key=lambda item: numbers[item[0]]):
        assert index is not None
        ranges = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        parts.setdefault(tuple(ranges), []).append(numbers[device])
    return parts


def _draw_parts(
    axis: Axes,
    parts: Mapping[tuple[tuple[int, int], ...], list[int]],
    shape: tuple[int, int],
    colours: ScalarMappable,
) -> None:
    for ((top, bottom), (left, right)), chips in parts.items():
        colour: Any = colours.to_rgba(np.asarray(chips[0]))
        size = (right - left, bottom - top)
        is_labelled = len(parts) <= _LABELLED_PARTS
        edge: dict[str, Any] = {"edgecolor": "white", "linewidth": 1 if is_labelled else 0.2}
        axis.add_patch(Rectangle((left, top), *size, facecolor=colour, **edge))
        if is_labelled:
            axis.text(
                *((left + right) / 2, (top + bottom) / 2, _chips(chips)),
                color="white" if sum(colour[:3]) < 1.5 else "black",
                fontsize=7,
                ha="center",
                va="center",
                rotation=90 if size[0] / shape[1] < size[1] / shape[0] / 2 else 0,
            )
    axis.set_xlim(0, shape[1])
    axis.set_ylim(shape[0], 0)
    axis.set_xticks([0, shape[1]], ["0", f"{shape[1]:,}"])
    axis.set_yticks([0, shape[0]], ["0", f"{shape[0]:,}"], rotation=90, va="center")


def _chips(chips: list[int]) -> str:
    return ", ".join(map(str, chips)) if len(chips) <= 4 else f"{chips[0]} ... {chips[-1]}"


def _held(config: ModelConfig, mesh: Mesh) -> tuple[int, int]:
    """Parameters of the network, and of one chip."""

    def of_chip(spec: ParamSpec) -> int:
        sharding = named_sharding(mesh, *spec.logical_axes)
        return int(np.prod(sharding.shard_shape(spec.shape)))

    block, outer = block_specs(config).values(), outer_specs(config).values()
    total = config.num_layers * sum(s.size for s in block) + sum(s.size for s in outer)
    return total, config.num_layers * sum(map(of_chip, block)) + sum(map(of_chip, outer))


@mpl.rc_context(LOOK)
def compiled_figure(report: CompiledReport) -> Figure:
    """Draws what a compiled step takes of a chip's memory, and the least time of each resource.

    Args:
        report: From `analyse`.

    Returns:
        A figure.
    """
    memory, times = report.memory, report.roofline
    figure = Figure(figsize=(10, 2.8), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    kept = memory.outputs - memory.aliased
    parts = {
        "parameters and state": memory.arguments,
        "temporaries": memory.temporaries,
        "other": kept + memory.code,
    }
    start = 0.0
    for (name, size), colour in zip(parts.items(), COLOURS, strict=False):
        left.barh([0], [size / 1e9], left=start, color=colour, label=f"{name}, {size / 1e9:.1f}")
        start += size / 1e9
    left.axvline(report.hbm_bytes / 1e9, color="0.3", linestyle="--", label="there is")
    left.set_yticks([])
    left.set_ylim(-0.6, 1.6)
    left.set_xlim(0, 1.05 * max(report.hbm_bytes, memory.total) / 1e9)
    left.set_xlabel("memory of a chip, GB")
    left.legend(frameon=False, ncols=2, loc="upper left", fontsize=8)
    bounds = {"products": times.compute, "memory traffic": times.memory, "network": times.network}
    longest = max(bounds, key=lambda name: bounds[name])
    bars = right.barh(
        list(bounds),
        [1e3 * seconds for seconds in bounds.values()],
        color=[COLOURS[0] if name == longest else COLOURS[5] for name in bounds],
    )
    right.bar_label(bars, fmt="%.1f", padding=3)
    right.invert_yaxis()
    right.margins(x=0.15)
    right.set_xlabel("least time of a step, ms")
    fits = "does not fit" if report.missing_bytes else "fits"
    write_title(
        figure,
        f"{report.topology}: the step {fits}, {memory.total / 1e9:.1f} of "
        f"{report.hbm_bytes / 1e9:.1f} GB a chip; {longest} bound it to {1e3 * times.step:.1f} ms "
        f"or more, model FLOPs utilisation is at most {report.utilisation:.0%}",
    )
    return figure
