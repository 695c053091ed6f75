"""The runs of a comparison, and the files that hold what came of them."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from opt_deus_jax.comparison.shared_fields import naming_shared_fields
from opt_deus_jax.config import Comparison, Contender, Experiment, UpscaleConfig, validate
from opt_deus_jax.errors import UserError
from opt_deus_jax.training.optimizer import learning_rate_schedule
from opt_deus_jax.training.settings import check_training
from opt_deus_jax.upscaling.methods import resolve_method
from opt_deus_jax.whole_files import write_text


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        contender: Of whom.
        kind: `sweep`, a short one that tries a learning rate, or `final`.
        seed: Of the order of the data.
        learning_rate: Its peak.
    """

    contender: Contender
    kind: Literal["sweep", "final"]
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        """Of its files."""
        if self.kind == "final":
            return f"{self.contender.name}_seed{self.seed}"
        return f"{self.contender.name}_sweep_{self.learning_rate:.3g}"


@naming_shared_fields()
def check_comparison(comparison: Comparison) -> None:
    """Refuses a comparison that could not be finished, before anything is run.

    Raises:
        UserError: A name is unusable or given twice, an upscale setting contradicts itself, a
            reference or exported one is no contender, or a number is out of range.
    """
    validate(dataclasses.replace(comparison, contenders=()))
    names = [contender.name for contender in comparison.contenders]
    for contender in comparison.contenders:
        if not re.fullmatch(r"[\w.-]+", contender.name) or names.count(contender.name) > 1:
            raise UserError(
                f"config field contenders: name {contender.name!r} must be unique, of letters, "
                "digits, '_', '.' and '-'"
            )
        validate(contender.upscale, "upscale.")
        resolve_method(contender.upscale)
    for field in ("references", "exported"):
        given = getattr(comparison, field)
        if not set(given) <= set(names) or (field == "references" and not given):
            raise UserError(f"config field {field}={given}: name some of {', '.join(names)}")
    if not comparison.seeds or comparison.sweep_seed in comparison.seeds:
        raise UserError(
            f"config field seeds={comparison.seeds}: give at least one, and not "
            f"sweep_seed={comparison.sweep_seed}"
        )
    if not 0 < comparison.sweep_fraction <= 1:
        raise UserError(
            f"config field sweep_fraction={comparison.sweep_fraction}: use more than 0, at most 1"
        )
    if comparison.rate_factor <= 1:
        raise UserError(f"config field rate_factor={comparison.rate_factor}: use more than 1")
    for field in ("max_rate_steps", "questions", "perplexity_pages"):
        if getattr(comparison, field) < 0:
            raise UserError(f"config field {field}={getattr(comparison, field)}: use 0 or more")
    if comparison.questions == 1:
        raise UserError("config field questions=1: one question has no error; use 0 or 2 and more")
    training, evaluations = comparison.experiment.training, comparison.evaluations
    if training.epochs:
        raise UserError(
            f"config field experiment.training.epochs={training.epochs}: use 0; all contenders "
            "are trained for experiment.training.steps"
        )
    steps = training.steps
    if evaluations < 1:
        raise UserError(f"config field evaluations={evaluations}: use 1 or more")
    if steps < evaluations or steps % evaluations:
        raise UserError(
            f"config field experiment.training.steps={steps}: use a positive multiple of "
            f"evaluations={evaluations}, or other evaluations"
        )
    for kind in ("sweep", "final"):
        _check_recipe(comparison, kind)


def _check_recipe(comparison: Comparison, kind: Literal["sweep", "final"]) -> None:
    """Finds what training itself would refuse only after a model has been grown."""
    run = Run(comparison.contenders[0], kind, comparison.sweep_seed, 0.0)
    experiment = experiment_of(comparison, run)
    steps = experiment.training.steps
    try:
        check_training(experiment.training)
        learning_rate_schedule(experiment.optimizer, steps)
    except UserError as error:
        raise UserError(f"{kind} runs, of {steps} steps: {error}") from None


def starting_rate(comparison: Comparison, contender: Contender) -> float:
    """Where the sweep of a contender begins."""
    if contender.learning_rate is None:
        return comparison.experiment.optimizer.learning_rate
    return contender.learning_rate


def upscale_settings(contender: Contender) -> dict[str, Any]:
    """What makes a contender: the fields of `upscale` that are not at their defaults.

    With `base`, the name of its folder, where that is its own.
    """
    defaults = dataclasses.asdict(UpscaleConfig())
    given = dataclasses.asdict(contender.upscale)
    settings = {name: value for name, value in given.items() if value != defaults[name]}
    return settings | ({"base": Path(contender.base).name} if contender.base else {})


def experiment_of(comparison: Comparison, run: Run) -> Experiment:
    """The experiment that a run is.

    Args:
        comparison: The comparison.
        run: One of its runs.

    Returns:
        The shared experiment with the run's contender, seed and learning rate; a sweep has fewer
        steps, the warm-up in proportion, and held-out losses at both ends only.
    """
    shared = comparison.experiment
    training, optimizer = shared.training, shared.optimizer
    steps, warmup = training.steps, optimizer.warmup_steps
    every = steps // comparison.evaluations
    if run.kind == "sweep":
        steps = max(round(steps * comparison.sweep_fraction), 1)
        warmup, every = round(warmup * comparison.sweep_fraction), 0
    return dataclasses.replace(
        shared,
        upscale=run.contender.upscale,
        data=dataclasses.replace(shared.data, seed=run.seed),
        training=dataclasses.replace(training, steps=steps, evaluate_every=every),
        optimizer=dataclasses.replace(
            optimizer, learning_rate=run.learning_rate, warmup_steps=warmup
        ),
    )


def recipe_of(comparison: Comparison, record_hashes: Mapping[str, str]) -> dict[str, Any]:
    """Everything that the runs of a comparison share and that their losses and scores depend on.

    Args:
        comparison: The comparison.
        record_hashes: Of the records by split.

    Returns:
        Values that JSON keeps; paths of this machine are not among them.
    """
    shared = comparison.experiment
    optimizer = dataclasses.asdict(shared.optimizer)
    del optimizer["learning_rate"]
    names = ("steps", "batch_size", "compute_dtype", "kernel_dtype", "frozen_dtype")
    evaluation = shared.evaluation
    return {
        "base": Path(shared.base).name,
        "records": dict(record_hashes),
        "sequence_length": shared.data.sequence_length,
        "optimizer": optimizer,
        "training": {name: getattr(shared.training, name) for name in names},
        "sweep": {"fraction": comparison.sweep_fraction, "seed": comparison.sweep_seed},
        "questions": comparison.questions,
        "perplexity_pages": comparison.perplexity_pages,
        "evaluation": {
            "tasks": list(evaluation.tasks),
            "num_fewshot": evaluation.num_fewshot,
            "compute_dtype": evaluation.compute_dtype,
        },
    }


def read_result(folder: Path, run: Run, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """What came of a run.

    Args:
        folder: With the results.
        run: The run.
        recipe: From `recipe_of`.

    Returns:
        The content of its file; None where it has not been run.

    Raises:
        UserError: The file is damaged, or of a run by another recipe.
    """
    path = folder / f"{run.name}.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        theirs = {
            "recipe": result["recipe"],
            "learning_rate": result["learning_rate"],
            "upscale": result["upscale"],
        }
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the result of a run ({error!r}); delete it") from None
    ours = {
        "recipe": json.loads(json.dumps(recipe)),
        "learning_rate": run.learning_rate,
        "upscale": json.loads(json.dumps(upscale_settings(run.contender))),
    }
    difference = first_difference(theirs, ours)
    if difference:
        raise UserError(
            f"{path}: this run had {difference}; set it back, or use another folder of results"
        )
    return result


def first_difference(theirs: Any, ours: Any, name: str = "") -> str:
    """Names the first field in which two trees of JSON differ, and both values; empty for none."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in [*theirs, *(key for key in ours if key not in theirs)]:
            found = first_difference(theirs.get(key), ours.get(key), f"{name}.{key}".strip("."))
            if found:
                return found
        return ""
    return "" if theirs == ours else f"{name}={theirs!r}, now it is {ours!r}"


def write_result(folder: Path, run: Run, result: Mapping[str, Any]) -> Path:
    """Writes what came of a run; a file is there only when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run.name}.json"
    # A line a field: the curves are long, and differences stay readable.
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path
