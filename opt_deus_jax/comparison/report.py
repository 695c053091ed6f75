"""From a folder of finished runs to tables, statistics and pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from opt_deus_jax.comparison import summary as statistics
from opt_deus_jax.comparison.finished import SUMMARY, FinishedRun, read_runs
from opt_deus_jax.comparison.published import published_curves, published_name, read_published
from opt_deus_jax.comparison.shown import finite, markdown, shown_tables
from opt_deus_jax.errors import UserError
from opt_deus_jax.reporting import comparison_plots, tuning_plots
from opt_deus_jax.reporting.drawing import Curve
from opt_deus_jax.reporting.plots import save
from opt_deus_jax.reporting.published_plots import published_beside_ours
from opt_deus_jax.reporting.tables import records_table
from opt_deus_jax.whole_files import write_json

# That many contenders get a colour in pictures; the others are grey.
_HIGHLIGHTED = 6


def write_report(
    results: Path, output: Path, references: Sequence[str], published: Path | None
) -> list[Path]:
    """Writes summary.json, summary.md and pictures.

    Args:
        results: A JSON file for each finished run, as `experiments.compare` leaves them.
        output: Gets the files; may be the same folder.
        references: Contenders that the others are held against; pictures take the first.
        published: The authors' `official_results.json`; None leaves their picture out.

    Returns:
        What was written. A picture for which there is no data yet is not drawn, and is removed
        where an older one lies.

    Raises:
        UserError: As `read_runs` and `read_published`, or no reference is given.
    """
    runs = read_runs(results)
    summary = summarize(runs, references)
    figures = draw_figures(runs, summary, references, published)
    output.mkdir(parents=True, exist_ok=True)
    written = [output / SUMMARY, output / "summary.md"]
    write_json(written[0], finite(summary))
    written[1].write_text(markdown(shown_tables(summary)))
    for name, figure in figures.items():
        path = output / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            save(figure, path)
            written.append(path)
    return written


def summarize(
    runs: Sequence[FinishedRun], references: Sequence[str]
) -> dict[str, list[statistics.Row]]:
    """All statistics: `contenders`, `paired`, `sweeps`, `steps` and `diagnostics`.

    Args:
        runs: From `read_runs`.
        references: Contenders that the others are held against.

    Returns:
        Rows by table, see the functions of `comparison.summary`.

    Raises:
        UserError: No reference is given.
    """
    if not references:
        raise UserError("config field references: name at least one contender")
    return {
        "contenders": statistics.contender_rows(runs),
        "paired": statistics.paired_rows(runs, references),
        "sweeps": statistics.sweep_rows(runs),
        "steps": statistics.step_rows(runs, references),
        "diagnostics": statistics.diagnostics_rows(runs),
    }


def summary_tables(summary: dict[str, list[statistics.Row]]) -> list[Table]:
    """Tables for the screen.

    Args:
        summary: From `summarize`.

    Returns:
        Tables in the order of reading.
    """
    return [records_table(rows, title) for title, rows in shown_tables(summary)]


def draw_figures(
    runs: Sequence[FinishedRun],
    summary: dict[str, list[statistics.Row]],
    references: Sequence[str],
    published: Path | None,
) -> dict[str, Figure | None]:
    """Draws all pictures.

    Args:
        runs: From `read_runs`.
        summary: From `summarize`.
        references: Contenders that the others are held against.
        published: The authors' results.

    Returns:
        By name a figure; None where there is nothing to draw.
    """
    finals = {n: found for n, found in statistics.finals_by_contender(runs).items() if found}
    front, first = highlighted(finals, references), references[0]
    ended = [row for row in summary["contenders"] if row["seeds"]]
    losses = {name: [run.final_loss for run in found] for name, found in finals.items()}
    paired = [
        row
        for row in summary["paired"]
        if row["reference"] == first and row["loss_difference"] is not None
    ]
    by_task = statistics.task_accuracies(runs)
    steps = [
        row
        for row in summary["steps"]
        if row["times"] is not None and row["held_against"] != row["contender"]
    ]
    reports = [row for row in summary["diagnostics"] if row["loss"] is not None]
    sweeps, curves = summary["sweeps"], _curves(finals)
    searched = any(len(row["losses"]) > 1 for row in sweeps)
    plots, tuning = comparison_plots, tuning_plots
    return {
        "loss_curves": plots.loss_curves(curves, first, front) if finals else None,
        "final_losses": plots.final_losses(ended, losses, paired, first, front) if finals else None,
        "paired_differences": plots.paired_differences(paired, first, front) if paired else None,
        "accuracies": plots.accuracies(by_task, front) if by_task else None,
        "step_times": tuning.step_times(steps) if steps else None,
        "learning_rates": tuning.learning_rates(sweeps, front) if searched else None,
        "diagnostics": tuning.diagnostics_against_outcome(reports) if reports[1:] else None,
        "published": _published_figure(finals, ended, published) if published and finals else None,
    }


def highlighted(finals: dict[str, list[FinishedRun]], references: Sequence[str]) -> list[str]:
    """Contenders that get a colour: references, best, best that transports, best of other weights.

    Args:
        finals: By contender, the best first.
        references: Contenders that the others are held against.

    Returns:
        At most six.
    """
    moved = [name for name, found in finals.items() if found[0].method["weights"] == "transport"]
    wanted = dict.fromkeys([*references, *list(finals)[:1], *moved[:1]])
    names = [name for name in wanted if name in finals]
    kinds = {_kind(finals[name][0]) for name in names}
    for name, found in finals.items():
        if name not in names and _kind(found[0]) not in kinds:
            names.append(name)
            kinds.add(_kind(found[0]))
    return names[:_HIGHLIGHTED]


def _kind(run: FinishedRun) -> tuple[Any, ...]:
    return run.method["weights"], run.method["transport"], run.layout in ("none", "stack")


def _curves(finals: dict[str, list[FinishedRun]]) -> dict[str, Curve]:
    curves = {}
    for name, found in finals.items():
        shared = set.intersection(*({x["tokens"] for x in run.held_out} for run in found))
        by_seed = {
            run.seed: np.array([x["loss"] for x in run.held_out if x["tokens"] in shared])
            for run in found
        }
        curves[name] = (np.array(sorted(shared), float), by_seed)
    return curves


def _published_figure(
    finals: dict[str, list[FinishedRun]],
    ended: Sequence[statistics.Row],
    path: Path,
) -> Figure:
    theirs = {
        method: [(x.step, x.word_perplexity, x.mean_accuracy) for x in found]
        for method, found in published_curves(read_published(path)).items()
    }
    runs = [run for found in finals.values() for run in found]
    # What was grown before, and is trained on here, is not what they call the base.
    counterparts = {
        name: published_name(found[0].method)
        for name, found in finals.items()
        if "base" not in found[0].upscale
    }
    run = max(runs, key=lambda run: run.parameters)
    seeds = len({run.seed for run in runs})
    ours = (
        f"ours: {run.recipe['base']} grown to {run.parameters / 1e6:,.0f}M, "
        f"{run.steps * run.tokens_per_step / 1e6:.3g}M tokens, {seeds} seed{'s' * (seeds > 1)}"
    )
    return published_beside_ours(
        theirs,
        ended,
        {name: known for name, known in counterparts.items() if known},
        ("published: Llama-3.2-1B 1.24B→1.72B, 1.5B tokens, one seed", ours),
    )
