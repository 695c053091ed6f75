"""Tables on the screen."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

# Every launcher shows something; few solve what makes ott load, which takes as long as all else.
if TYPE_CHECKING:
    from opt_deus_jax.models.accounting import Costs
    from opt_deus_jax.models.layer_kinds import LayerKind
    from opt_deus_jax.transport.diagnostics import MatrixReport
    from opt_deus_jax.upscaling.expand import Expansion
    from opt_deus_jax.upscaling.identity import IdentityReport
    from opt_deus_jax.upscaling.layout import LayerOrigin
    from opt_deus_jax.upscaling.lesa import PredictorReport

_FILE_COLUMNS = 120


def _kind(kind: LayerKind) -> str:
    attention = "full" if kind.window is None else f"window {kind.window}"
    attention = attention if kind.rope is not None else f"{attention}, not rotated"
    return f"{attention}, experts" if kind.has_experts else attention


def layer_table(
    layers: Sequence[LayerOrigin],
    trained: Sequence[frozenset[str]],
    kinds: Sequence[LayerKind],
    title: str,
) -> Table:
    """A line per layer of the grown model: what it is, and whether any of it is trained."""
    table = Table("depth", "layer", "parents", "attention", "", title=title)
    for layer, names, kind in zip(layers, trained, kinds, strict=True):
        if layer.base_layer is not None:
            origin, parents = f"base {layer.base_layer}", "copy" if layer.is_new else ""
        else:
            above = "none above" if layer.next is None else f"B = {layer.next}"
            origin, parents = "[bold green]new[/]", f"A = {layer.previous}, {above}"
        table.add_row(
            *(str(layer.depth), origin, parents, _kind(kind)),
            "[green]trained[/]" if names else "[dim]frozen[/]",
        )
    return table


def costs_table(costs: Costs, title: str) -> Table:
    """Parameters, FLOPs a token, and memory."""
    table = Table("quantity", "value", title=title)
    table.columns[1].justify = "right"
    rows = (
        ("parameters", f"{costs.parameters:,}"),
        *(
            [("parameters that a token meets", f"{costs.active_parameters:,}")]
            if costs.active_parameters != costs.parameters
            else []
        ),
        ("parameters trained", f"{costs.trained_parameters:,}"),
        ("FLOPs a token, forward", f"{costs.forward_flops:,}"),
        ("FLOPs a token, backward", f"{costs.backward_flops:,}"),
        ("FLOPs a token, recomputed", f"{costs.recomputed_flops:,}"),
        *(
            [("FLOPs a token, experts it is not sent to", f"{costs.idle_expert_flops:,}")]
            if costs.active_parameters != costs.parameters
            else []
        ),
        ("memory of training, without activations", f"{costs.training_bytes / 2**30:.2f} GiB"),
    )
    for row in rows:
        table.add_row(*row)
    return table


def diagnostics_table(reports: Mapping[int, Sequence[MatrixReport]]) -> Table:
    """A line per transported matrix."""
    table = Table(
        *("layer", "matrix", "ok", "steps", "error", "sources", "norm/A", "norm/B", "match"),
        title="Transport of A's neurons onto B's",
        caption="ok: converged; steps: Sinkhorn iterations; error: of the marginals; sources: "
        "A's neurons that reach one of B's; norm: of the fused kernel over the parent's; match: "
        "matched cost over mean cost",
    )
    for depth, matrices in reports.items():
        for matrix in matrices:
            table.add_row(
                str(depth),
                matrix.name,
                "yes" if matrix.converged else "[bold red]NO[/]",
                str(matrix.iterations),
                f"{matrix.marginal_error:.1e}",
                f"{matrix.effective_sources:.1f}",
                f"{matrix.norm_ratio_previous:.3f}",
                f"{matrix.norm_ratio_next:.3f}",
                f"{matrix.match_gain:.3f}",
            )
    return table


def predictor_table(reports: Sequence[PredictorReport]) -> Table:
    """A line per matrix that method `lesa` has learned to predict."""
    table = records_table(
        [dataclasses.asdict(report) for report in reports],
        "What predicts the layer between two, on the rows it was trained on",
    )
    table.caption = (
        "mean: of the mean of the neighbours as prediction; error: norm of what is missed over "
        "the norm of the rows, 1 for a prediction of zeros"
    )
    return table


def records_table(rows: Sequence[Mapping[str, object]], title: str) -> Table:
    """A line per mapping, a column per key of the first; floats to three digits."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=0, collapse_padding=True)
    for key in rows[0]:
        # In a narrow window cells are folded, never cut.
        table.add_column(key, overflow="fold")
    for row in rows:
        cells = (row[key] for key in rows[0])
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells))
    return table


def identity_line(identity: IdentityReport) -> str:
    """One sentence about the distance of the grown model from its base."""
    if identity.bit_identical:
        return (
            f"identity: the grown model gives the base's logits bit for bit "
            f"({identity.tokens} tokens, float32)"
        )
    return (
        f"not an identity: logits differ by up to {identity.max_difference:.3g}, mean KL "
        f"{identity.mean_divergence:.4g} nats ({identity.tokens} tokens)"
    )


def expansion_report(expansion: Expansion, picture: Path) -> list[Table | str]:
    """What came of an expansion, in tables and lines.

    Args:
        expansion: It.
        picture: Where its picture is, if it has one.
    """
    items: list[Table | str] = []
    if picture.exists():
        items += [diagnostics_table(expansion.reports), f"picture: {picture}"]
    if expansion.predictors:
        items.append(predictor_table(expansion.predictors))
    return [*items, identity_line(expansion.identity), f"grown model: {expansion.directory}"]


def show(*items: Table | str) -> None:
    """Prints tables and lines; into a file or pipe in lines of 120 characters."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _FILE_COLUMNS
    console = Console(highlight=False, width=width)
    for item in items:
        console.print(item, soft_wrap=isinstance(item, str), markup=not isinstance(item, str))
