"""Statistics over the runs of a comparison, as plain rows; None where there is nothing to say."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from scipy import stats

from opt_deus_jax.comparison.finished import FinishedRun

Row = dict[str, Any]
FRACTIONS = (0.2, 0.4, 0.6, 0.8, 1.0)
# Of what is compared, as a part of it.
_ROUNDING = 1e-12
# What is compared in pairs: name, and where a run has it.
METRICS: Mapping[str, Callable[[FinishedRun], float | None]] = {
    "loss": lambda run: run.final_loss,
    "accuracy": lambda run: run.mean_accuracy,
    "word_perplexity": lambda run: run.word_perplexity,
}


def finals_by_contender(runs: Iterable[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Final runs of every contender, those with the lowest mean loss first.

    Args:
        runs: Of all kinds.

    Returns:
        By contender its final runs; last and empty for one of which only sweeps are there.
    """
    found: dict[str, list[FinishedRun]] = {}
    for run in runs:
        found.setdefault(run.contender, []).extend([run] if run.kind == "final" else [])

    def order(name: str) -> float:
        return _ranked(statistics.fmean(run.final_loss for run in found[name] or ()))

    ended = sorted((name for name in found if found[name]), key=order)
    return {name: found[name] for name in [*ended, *(n for n in found if not found[n])]}


def contender_rows(runs: Sequence[FinishedRun]) -> list[Row]:
    """A row for each contender: what came of it, over its seeds.

    `accuracy` is the mean over tasks and seeds, and like the perplexity None where a seed diverged,
    which is asked nothing; `accuracy_stderr` is its standard error over seeds;
    `accuracy_binomial` the error that comes of the number of questions, which more seeds do not
    lessen: sqrt(sum over tasks of acc_stderr^2) / tasks, its root mean square over seeds.

    Args:
        runs: Of all kinds.

    Returns:
        Rows, the lowest final loss first.
    """
    rows = []
    for name, finals in finals_by_contender(runs).items():
        any_run = finals[0] if finals else next(run for run in runs if run.contender == name)
        perplexities = _all_or_none([run.word_perplexity for run in finals])
        accuracies = _all_or_none([run.mean_accuracy for run in finals])
        losses = {
            f"loss_{100 * share:.0f}": _mean([run.loss_at(share) for run in finals])
            for share in FRACTIONS
        }
        row = {
            "contender": name,
            "layout": any_run.layout,
            "learning_rate": finals[0].learning_rate if finals else None,
            "seeds": len(finals),
            **losses,
            "loss_stderr": standard_error([run.final_loss for run in finals]),
            "accuracy": _mean(accuracies),
            "accuracy_stderr": standard_error(accuracies),
            "accuracy_binomial": _binomial_error(finals) if accuracies else None,
            "word_perplexity": _mean(perplexities),
            "word_perplexity_stderr": standard_error(perplexities),
            "step_seconds": _median([run.step_seconds for run in finals]),
            "tokens_per_second": _median([run.tokens_per_second for run in finals]),
        }
        rows.append(row)
    return rows


def paired_rows(runs: Sequence[FinishedRun], references: Sequence[str]) -> list[Row]:
    """A row for each contender and reference: differences over the seeds that both have.

    For each of `METRICS` M: `M_difference` (contender minus reference, mean over pairs), `M_stderr`
    (of that mean), `M_t` (their ratio), `M_p` (two-sided, Student's t; no correction for the number
    of contenders) and `M_pairs`. With fewer than two pairs, or pairs that all differ by the same,
    there is no error to be had.

    Args:
        runs: Of all kinds.
        references: Contenders; one without runs makes rows with no pairs.

    Returns:
        Rows, by reference, then as in `contender_rows`.
    """
    finals = finals_by_contender(runs)
    rows = []
    for reference in references:
        theirs = {run.seed: run for run in finals.get(reference, ())}
        for name, ours in finals.items():
            if name == reference:
                continue
            row: Row = {"contender": name, "reference": reference}
            both = [(run, theirs[run.seed]) for run in ours if run.seed in theirs]
            for metric, value in METRICS.items():
                row |= _paired(metric, [(value(our), value(their)) for our, their in both])
            rows.append(row)
    return rows


def _paired(metric: str, pairs: Sequence[tuple[float | None, float | None]]) -> Row:
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    differences = [a - b for a, b in known]
    error = standard_error(differences)
    # Equal differences of means come out equal but for rounding.
    if error is not None and error <= _ROUNDING * max(map(abs, itertools.chain(*known))):
        error = 0.0
    t = statistics.fmean(differences) / error if error else None
    p = None if t is None else 2 * float(stats.t.sf(abs(t), len(differences) - 1))
    return {
        f"{metric}_difference": _mean(differences),
        f"{metric}_stderr": error,
        f"{metric}_t": t,
        f"{metric}_p": p,
        f"{metric}_pairs": len(differences),
    }


def sweep_rows(runs: Sequence[FinishedRun]) -> list[Row]:
    """A row for each contender with tried learning rates.

    Args:
        runs: Of all kinds.

    Returns:
        Rows with `losses` (held-out loss by learning rate, ascending), `chosen` (the rate of the
        lowest; of equal ones the lowest rate), `at_edge` (whether it is the smallest or largest of
        those tried, so that a better one may lie beyond) and `used` (by the final runs).
    """
    rows = []
    for name, finals in finals_by_contender(runs).items():
        tried = [run for run in runs if run.contender == name and run.kind == "sweep"]
        if not tried:
            continue
        losses = {
            r.learning_rate: r.final_loss for r in sorted(tried, key=lambda r: r.learning_rate)
        }
        chosen = min(losses, key=lambda rate: _ranked(losses[rate]))
        rows.append(
            {
                "contender": name,
                "losses": losses,
                "chosen": chosen,
                "at_edge": chosen in (min(losses), max(losses)),
                "used": finals[0].learning_rate if finals else None,
            }
        )
    return rows


def step_rows(runs: Sequence[FinishedRun], references: Sequence[str]) -> list[Row]:
    """A row for each contender that is not at the top, and for those at the top it is held against.

    The one to be held against is the contender at the top with the same weights, zero-init,
    transport and trained parameters; where there is none, the first reference at the top. Times are
    compared on machines that both ran on.

    Args:
        runs: Of all kinds.
        references: Contenders that the others are held against.

    Returns:
        Rows with `step_seconds`, `times` (as long as at the top), `flops_per_token` and
        `times_by_flops`; the two ratios are None where nothing at the top can be compared.
    """
    finals = {name: found for name, found in finals_by_contender(runs).items() if found}
    tops = [name for name, found in finals.items() if found[0].layout == "top"]
    usual = [name for name in references if name in tops]
    others: dict[str, str | None] = {}
    for name, found in finals.items():
        if name not in tops:
            alike = [top for top in tops if _same_but_layout(finals[top][0], found[0])]
            others[name] = next(iter([*alike, *usual]), None)
    partners = {top: top for top in tops if top in others.values()} | others
    rows = []
    for name, top in partners.items():
        ours, theirs = finals[name], finals[top] if top else []
        rows.append(
            {
                "contender": name,
                "layout": ours[0].layout,
                "held_against": top,
                "step_seconds": _median([run.step_seconds for run in ours]),
                "times": _time_ratio(ours, theirs),
                "flops_per_token": ours[0].model_flops_per_token,
                "times_by_flops": ours[0].model_flops_per_token / theirs[0].model_flops_per_token
                if theirs
                else None,
            }
        )
    return rows


def _same_but_layout(first: FinishedRun, second: FinishedRun) -> bool:
    names = ("weights", "zero_init", "trained", "transport")
    return all(first.method[name] == second.method[name] for name in names)


def _time_ratio(ours: Sequence[FinishedRun], theirs: Sequence[FinishedRun]) -> float | None:
    ratios = []
    for machine in {str(run.machine): run.machine for run in ours}.values():
        medians = [
            _median([run.step_seconds for run in runs if run.machine == machine])
            for runs in (ours, theirs)
        ]
        if medians[0] is not None and medians[1] is not None:
            ratios.append(medians[0] / medians[1])
    return _median(ratios)


def diagnostics_rows(runs: Sequence[FinishedRun]) -> list[Row]:
    """A row for each contender that transports: means over its matrices, and its final loss.

    Args:
        runs: Of all kinds.

    Returns:
        Rows, as in `contender_rows`.
    """
    rows = []
    for name, finals in finals_by_contender(runs).items():
        ended = [run.final_loss for run in finals]
        reports = next((r.diagnostics for r in runs if r.contender == name and r.diagnostics), [])
        if reports:
            row = {"contender": name, "layout": finals[0].layout if finals else None}
            row |= {"matrices": len(reports)}
            for field in ("match_gain", "effective_sources", "norm_ratio_next"):
                row[field] = _mean([report[field] for report in reports])
            rows.append(row | {"loss": _mean(ended), "loss_stderr": standard_error(ended)})
    return rows


def task_accuracies(runs: Sequence[FinishedRun]) -> dict[str, dict[str, tuple[float, float]]]:
    """By contender and task the mean accuracy over seeds and the error of its questions."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name, finals in finals_by_contender(runs).items():
        asked = [run.accuracies for run in finals if run.accuracies]
        for task in asked[0] if asked else ():
            means = [accuracies[task]["acc"] for accuracies in asked]
            errors = [accuracies[task]["acc_stderr"] for accuracies in asked]
            error = _root_mean_square(errors)
            found.setdefault(name, {})[task] = (statistics.fmean(means), error)
    return found


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values; None of fewer than two, NaN where one diverged."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _binomial_error(finals: Sequence[FinishedRun]) -> float | None:
    asked = [run.accuracies for run in finals if run.accuracies]
    errors = [
        math.hypot(*(t["acc_stderr"] for t in tasks.values())) / len(tasks) for tasks in asked
    ]
    return _root_mean_square(errors) if errors else None


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(statistics.fmean(value**2 for value in values))


def _mean(values: Sequence[float | None]) -> float | None:
    known = _all_or_none(values)
    return statistics.fmean(known) if known else None


def _all_or_none(values: Sequence[float | None]) -> list[float]:
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else []


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _ranked(loss: float) -> float:
    # NaN, of a run that diverged, is worse than any number.
    return math.inf if math.isnan(loss) else loss
