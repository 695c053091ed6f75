"""Which settings a training has, and which of them a checkpoint may be taken up with."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from opt_deus_jax.config import Experiment, TrainingConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.training.segments import TrainedNames

# They change rounding at most, so they may change when a training is taken up again. So may the
# mesh, which is not recorded at all.
_FREE_SETTINGS = frozenset(
    f"training.{name}"
    for name in (
        "accumulation_steps",
        "attention",
        "checkpoint_every",
        "evaluate_every",
        "experts",
        "keep_checkpoints",
        "log_every",
        "loss_chunk_tokens",
        "remat",
    )
)


def resolve_steps(training: TrainingConfig, num_records: int) -> TrainingConfig:
    """Turns epochs into steps.

    Args:
        training: The settings.
        num_records: Records of the training text.

    Returns:
        The settings with `steps` filled in; the last, incomplete batch of all epochs is left out.

    Raises:
        UserError: Both or neither of steps and epochs are set.
    """
    if (training.steps > 0) == (training.epochs > 0) or min(training.steps, training.epochs) < 0:
        raise UserError(
            f"config field training.epochs={training.epochs} with training.steps={training.steps}: "
            "set one of them to a positive number and the other to 0"
        )
    steps = training.steps or training.epochs * num_records // max(training.batch_size, 1)
    return dataclasses.replace(training, steps=steps)


def check_training(training: TrainingConfig) -> None:
    """Checks the ranges of the settings.

    Raises:
        UserError: One is out of range.
    """
    positive = ("steps", "batch_size", "accumulation_steps", "loss_chunk_tokens", "log_every")
    for name in (*positive, "checkpoint_every", "keep_checkpoints"):
        if getattr(training, name) < 1:
            raise UserError(
                f"config field training.{name}={getattr(training, name)}: use 1 or more"
            )
    if training.evaluate_every < 0:
        raise UserError(
            f"config field training.evaluate_every={training.evaluate_every}: use 0 or more"
        )
    if training.batch_size % training.accumulation_steps:
        raise UserError(
            f"config field training.accumulation_steps={training.accumulation_steps}: it must "
            f"divide training.batch_size={training.batch_size}"
        )


def settings_of(
    experiment: Experiment, model: ModelConfig, trained: TrainedNames
) -> dict[str, Any]:
    """Everything that a checkpoint depends on, flat, by the names that users know.

    Args:
        experiment: With its steps resolved.
        model: The network.
        trained: Its trained parameters.

    Returns:
        Values as JSON gives them back.
    """
    parts = {
        "optimizer": dataclasses.asdict(experiment.optimizer),
        "training": dataclasses.asdict(experiment.training),
        "model": dataclasses.asdict(model),
    }
    settings = {f"{part}.{name}": v for part, values in parts.items() for name, v in values.items()}
    settings["data.seed"] = experiment.data.seed
    if model.experts and model.experts.balance:
        # A loss of what is computed at once: here the parts of a batch are more than rounding.
        training = experiment.training
        settings["rows of a balance"] = training.batch_size // training.accumulation_steps
    settings["trained layers"] = "".join("T" if names else "F" for names in trained.blocks)
    settings["trained parameters"] = " ".join(sorted(trained.outer.union(*trained.blocks)))
    return json.loads(json.dumps(settings))


def refuse_other_settings(saved: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    """Refuses a checkpoint of another training.

    Args:
        saved: What `settings_of` gave when it was written.
        current: What it gives now.
        path: The checkpoint.

    Raises:
        UserError: They differ in more than rounding.
    """
    for name in sorted((saved.keys() | current.keys()) - _FREE_SETTINGS):
        if saved.get(name) != current.get(name):
            raise UserError(
                f"{path}: this checkpoint was trained with {name}={saved.get(name)!r}, now it is "
                f"{current.get(name)!r}; set it back or use another --workdir"
            )
