"""Reads the files that finished runs of a comparison leave."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from opt_deus_jax.errors import UserError

# Lies in the folder of the runs where the report is written there.
SUMMARY = "summary.json"


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What came of one run; a file may hold more, for its reader.

    Attributes:
        contender: Name of what was trained.
        kind: `final`, or `sweep` for a trial of a learning rate.
        seed: Of the order of the data.
        learning_rate: Its peak.
        upscale: What makes the contender; `base` among it where it is grown from one of its own.
        base_sha256: Of all tensors of what it is grown from.
        method: Layout, weights, zero_init, trained and transport.
        steps: Optimizer steps taken.
        tokens_per_step: Tokens of a step.
        held_out: Step, tokens and held-out loss (nats a token), from before training to its end.
        accuracies: By task: acc, acc_stderr and questions; empty where nothing was asked.
        word_perplexity: Of wikitext; None where it was not taken.
        step_seconds: Of the median step.
        tokens_per_second: Of the median step.
        model_flops_per_token: Forward and backward, nothing recomputed.
        parameters: Of the model.
        trained_parameters: Of them, those that are trained.
        diagnostics: Of each transported matrix; empty where nothing is transported.
        recipe: What all runs must share.
        machine: Where it ran.
        command: That makes it.
        path: Its file.
    """

    contender: str
    kind: str
    seed: int
    learning_rate: float
    upscale: Mapping[str, Any]
    base_sha256: str
    method: Mapping[str, Any]
    steps: int
    tokens_per_step: int
    held_out: list[dict[str, float]]
    step_seconds: float
    tokens_per_second: float
    model_flops_per_token: float
    parameters: int
    trained_parameters: int
    diagnostics: list[dict[str, Any]]
    recipe: Mapping[str, Any]
    machine: Mapping[str, Any]
    command: str
    path: Path
    accuracies: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    word_perplexity: float | None = None

    @property
    def layout(self) -> str:
        """Where the new layers are; `none` for a base that is trained on."""
        layout = self.method["layout"]
        return layout if self.method["weights"] or layout == "stack" else "none"

    @property
    def final_loss(self) -> float:
        """Held-out loss after the last step, nats a token."""
        return self.held_out[-1]["loss"]

    @property
    def mean_accuracy(self) -> float | None:
        """Unweighted over tasks; None where nothing was asked."""
        if not self.accuracies:
            return None
        return sum(task["acc"] for task in self.accuracies.values()) / len(self.accuracies)

    def loss_at(self, fraction: float) -> float | None:
        """Held-out loss after a share of the tokens; None where none was taken just then."""
        found = [x for x in self.held_out if abs(x["step"] - fraction * self.steps) < 1e-6]
        return found[0]["loss"] if found else None


_FIELDS = [field.name for field in dataclasses.fields(FinishedRun) if field.name != "path"]
# Tried learning rates are asked nothing.
_OF_FINAL_RUNS = ("accuracies", "word_perplexity")
_PARTS: dict[str, tuple[str, ...]] = {
    "method": ("layout", "weights", "zero_init", "trained", "transport"),
    "recipe": ("base",),
    "held_out": ("step", "tokens", "loss"),
    "accuracies": ("acc", "acc_stderr", "questions"),
    "diagnostics": ("match_gain", "effective_sources", "norm_ratio_next"),
}


def read_runs(folder: Path) -> list[FinishedRun]:
    """Reads all files of a folder.

    Args:
        folder: With a JSON file for each run.

    Returns:
        Runs in the order of their contenders' names, kinds, seeds and learning rates.

    Raises:
        UserError: No run is there, a file or field is unusable, a run is there twice, or the runs
            cannot be compared.
    """
    runs = [read_run(path) for path in sorted(folder.glob("*.json")) if path.name != SUMMARY]
    if not runs:
        raise UserError(f"{folder}: no finished run (*.json); run experiments.compare first")
    runs.sort(key=lambda run: (run.contender, run.kind, run.seed, run.learning_rate))
    for run in runs[1:]:
        _refuse_difference(runs[0], run, runs[0].recipe, run.recipe, "recipe")
    _refuse_other_bases(runs)
    finals = [run for run in runs if run.kind == "final"]
    _refuse_other_training(finals)
    _refuse_twice(runs)
    return runs


def read_run(path: Path) -> FinishedRun:
    """Reads one file.

    Args:
        path: The file.

    Returns:
        The run.

    Raises:
        UserError: It is no JSON object, or a field is missing; names both.
    """
    try:
        # Infinity as NaN: both say that a run diverged, and no mean of infinities is in the way.
        content = json.loads(path.read_text(), parse_constant=lambda _: math.nan)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no JSON ({error}); delete it and run it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not the result of a run; move it out of the folder")
    optional = _OF_FINAL_RUNS if content.get("kind") == "sweep" else ()
    _require(path, content, [name for name in _FIELDS if name not in optional])
    if content["kind"] not in ("final", "sweep"):
        raise UserError(f"{path}: field kind={content['kind']!r}: must be final or sweep")
    if not content["held_out"]:
        raise UserError(f"{path}: field held_out is empty; run it again")
    for name, wanted in _PARTS.items():
        value = content.get(name, {})
        if name in ("method", "recipe"):
            value = [value]
        for part in value.values() if isinstance(value, dict) else value:
            _require(path, part, wanted, f"{name}.")
    last = content["held_out"][-1]["step"]
    if last != content["steps"]:
        raise UserError(
            f"{path}: field held_out ends at step {last} of {content['steps']}; run it again"
        )
    return FinishedRun(**{k: content[k] for k in _FIELDS if k in content}, path=path)


def _require(path: Path, content: Any, names: Iterable[str], prefix: str = "") -> None:
    for name in names:
        if not isinstance(content, dict) or name not in content:
            raise UserError(f"{path}: field {prefix}{name} is missing; delete it and run it again")


def _refuse_difference(
    first: FinishedRun, other: FinishedRun, ours: Any, theirs: Any, name: str
) -> None:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            _refuse_difference(first, other, ours.get(key), theirs.get(key), f"{name}.{key}")
    elif ours != theirs:
        raise UserError(
            f"{first.path} has {name}={ours!r} but {other.path.name} has {theirs!r}: their losses "
            "cannot be compared; keep them in different folders"
        )


def _refuse_other_bases(runs: list[FinishedRun]) -> None:
    """Of one name there may be one base; the shared one has none in `upscale`."""
    firsts: dict[str, FinishedRun] = {}
    for run in runs:
        first = firsts.setdefault(run.upscale.get("base", ""), run)
        _refuse_difference(first, run, first.base_sha256, run.base_sha256, "base_sha256")


def _refuse_other_training(finals: list[FinishedRun]) -> None:
    firsts: dict[str, FinishedRun] = {}
    for run in finals:
        first = firsts.setdefault(run.contender, run)
        for name in ("learning_rate", "method"):
            _refuse_difference(first, run, getattr(first, name), getattr(run, name), name)
        for name in ("steps", "tokens_per_step"):
            _refuse_difference(finals[0], run, getattr(finals[0], name), getattr(run, name), name)
    asked = [run for run in finals if run.accuracies]
    for run in asked[1:]:
        tasks = sorted(asked[0].accuracies), sorted(run.accuracies)
        _refuse_difference(asked[0], run, *tasks, "tasks of accuracies")


def _refuse_twice(runs: list[FinishedRun]) -> None:
    seen: dict[tuple[Any, ...], FinishedRun] = {}
    for run in runs:
        key = (run.contender, run.kind, run.seed, run.learning_rate)
        if key in seen:
            raise UserError(f"{run.path}: the same run as {seen[key].path.name}; delete one")
        seen[key] = run
