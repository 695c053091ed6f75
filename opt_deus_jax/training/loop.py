"""The training loop, from a model on disk to the last checkpoint."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from opt_deus_jax.checkpoints import orbax
from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.config import Experiment, TrainingConfig
from opt_deus_jax.data.loader import held_out_batches, training_dataset
from opt_deus_jax.data.records import Records
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.language_model import Params
from opt_deus_jax.models.model_config import ModelConfig, read_model_config
from opt_deus_jax.training.metrics import StepMonitor, WriteMetrics, open_metrics
from opt_deus_jax.training.optimizer import learning_rate_schedule, make_optimizer
from opt_deus_jax.training.segments import (
    Segment,
    TrainedNames,
    invert_mask,
    plan_segments,
    trained_mask,
)
from opt_deus_jax.training.step import (
    Evaluate,
    TrainState,
    TrainStep,
    initial_state,
    make_evaluation_loss,
    make_train_step,
)
from opt_deus_jax.training.weights import load_params

# Settings that may change when a training is taken up again: they change rounding at most.
_FREE_SETTINGS = frozenset(
    f"training.{name}"
    for name in (
        "accumulation_steps",
        "checkpoint_every",
        "evaluate_every",
        "keep_checkpoints",
        "log_every",
        "loss_chunk_tokens",
        "remat",
    )
)


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What a finished training leaves.

    Attributes:
        state: The last state; the frozen parameters are those of the source.
        held_out_losses: (step, nats a token) of every held-out loss, from step 0 to the last.
        resumed_from: Step of the checkpoint that this run began with, 0 for a fresh start.
        last_step: Optimizer steps made, `resumed_from` where there was nothing left to do.
    """

    state: TrainState
    held_out_losses: tuple[tuple[int, float], ...]
    resumed_from: int
    last_step: int


def train(
    experiment: Experiment,
    source: CheckpointSource,
    *,
    trained: TrainedNames,
    train_records: Records,
    held_out_records: Records,
    workdir: Path,
    fingerprints: Mapping[str, str],
) -> TrainingResult:
    """Trains, from the latest checkpoint of the work directory where there is one.

    A run that is killed at any moment and started again ends bit for bit where an uninterrupted
    one does.

    Args:
        experiment: Its `data.seed`, `optimizer` and `training` are used.
        source: The model to train.
        trained: Its parameters that are trained.
        train_records: Training records.
        held_out_records: Held-out records.
        workdir: Gets `checkpoints/`, `metrics.jsonl` and `tensorboard/`.
        fingerprints: Names and hashes of the model and the records; others' are refused.

    Returns:
        The last state and the held-out losses.

    Raises:
        UserError: A setting is out of range, the checkpoint belongs to something else, or the
            loss is not finite.
    """
    training = experiment.training
    _check(training)
    program = _program(experiment, source, trained)
    batches = training_dataset(
        train_records, batch_size=training.batch_size, seed=experiment.data.seed
    )
    settings = _settings(experiment, program.config, trained)
    settings |= {f"fingerprint of the {name}": value for name, value in fingerprints.items()}
    # Put by name: what is not on a named device is compiled for once more in a resumed run.
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    load = functools.partial(load_params, source, program.config, program.segments, sharding=device)
    with orbax.open_checkpointer(
        workdir / "checkpoints",
        save_every=training.checkpoint_every,
        last_step=training.steps,
        keep=training.keep_checkpoints,
    ) as checkpointer:
        trainable = load(dtype=jnp.dtype("float32"), wanted=program.mask)
        state = jax.device_put(initial_state(trainable, program.optimizer), device)
        progress = _resume(checkpointer, state, batches, settings)
        if progress.last_step == training.steps:
            tqdm.write(f"training is already finished, all {training.steps} steps are made")
            return progress
        frozen = load(dtype=jnp.dtype(training.frozen_dtype), wanted=invert_mask(program.mask))
        run = _Run(training, program, checkpointer, batches, frozen, held_out_records, settings)
        with open_metrics(workdir, last_step=progress.last_step or -1) as write:
            return _make_steps(run, progress, write)


class _Program(NamedTuple):
    config: ModelConfig
    segments: tuple[Segment, ...]
    mask: Any
    optimizer: optax.GradientTransformation
    train_step: TrainStep
    evaluate: Evaluate


class _Run(NamedTuple):
    training: TrainingConfig
    program: _Program
    checkpointer: orbax.Checkpointer
    batches: Any
    frozen: Params
    held_out_records: Records
    settings: dict[str, Any]


def _program(experiment: Experiment, source: CheckpointSource, trained: TrainedNames) -> _Program:
    config = read_model_config(source.hf_config, source.name)
    segments = plan_segments(trained.blocks)
    schedule = learning_rate_schedule(experiment.optimizer, experiment.training.steps)
    optimizer = make_optimizer(experiment.optimizer, schedule)
    return _Program(
        config,
        segments,
        trained_mask(config, segments, trained.outer),
        optimizer,
        make_train_step(config, experiment.training, optimizer, schedule),
        make_evaluation_loss(config, experiment.training),
    )


def _make_steps(run: _Run, progress: TrainingResult, write: WriteMetrics) -> TrainingResult:
    training, program, start = run.training, run.program, progress.last_step
    state, losses = progress.state, progress.held_out_losses
    device = state.step.sharding
    with tqdm(desc="steps", initial=start, total=training.steps, disable=None) as bar:
        monitor = StepMonitor(
            write,
            bar,
            tokens_per_step=training.batch_size * run.held_out_records.sequence_length,
            log_every=training.log_every,
            latest_checkpoint=lambda: orbax.latest_step(run.checkpointer),
        )
        for step in range(start, training.steps + 1):
            if step > start:
                batch = next(run.batches)
                tokens_BL = jax.device_put(batch["tokens"], device)
                state, metrics = program.train_step(state, run.frozen, tokens_BL)
                monitor.observe(step, batch["record"], metrics)
            if _is_evaluated(step, training) and step not in dict(losses):
                monitor.flush()
                loss = held_out_loss(
                    program.evaluate, state.trainable, run.frozen, run.held_out_records, training
                )
                losses = (*losses, (step, loss))
                monitor.report_held_out(step, loss)
            if step > start and run.checkpointer.should_save(step):
                # Only what is known to be finite is saved.
                monitor.flush()
                metadata = {"settings": run.settings, "held_out_losses": losses}
                orbax.save(run.checkpointer, step, _saved_trees(state), run.batches, metadata)
    return TrainingResult(state, losses, progress.resumed_from, training.steps)


def held_out_loss(
    evaluate: Evaluate,
    trainable: Params,
    frozen: Params,
    records: Records,
    training: TrainingConfig,
) -> float:
    """Mean cross-entropy of all held-out records.

    Args:
        evaluate: From `make_evaluation_loss`.
        trainable: Param pytree with None for frozen leaves.
        frozen: The rest.
        records: The held-out records, at least one.
        training: The batch is that of one accumulation step.

    Returns:
        Nats a token.
    """
    sums = [
        evaluate(trainable, frozen, jnp.asarray(batch["tokens"]), jnp.asarray(batch["is_real"]))
        for batch in held_out_batches(records, training.batch_size // training.accumulation_steps)
    ]
    nats, tokens = zip(*jax.device_get(sums), strict=True)
    return sum(map(float, nats)) / sum(map(float, tokens))


def _saved_trees(state: TrainState) -> dict[str, Any]:
    # The step is the checkpoint's own number.
    return {"trainable": state.trainable, "optimizer_state": state.optimizer_state}


def _resume(
    checkpointer: orbax.Checkpointer, state: TrainState, batches: Any, settings: dict[str, Any]
) -> TrainingResult:
    """What the latest checkpoint holds; the given state where there is none."""
    step = orbax.latest_step(checkpointer)
    if step is None:
        return TrainingResult(state, (), 0, 0)
    metadata = orbax.load_metadata(checkpointer, step)
    _refuse_other(metadata["settings"], settings, Path(checkpointer.directory) / str(step))
    counter = jax.device_put(np.asarray(step, np.int32), state.step.sharding)
    trees = orbax.restore(checkpointer, step, _saved_trees(state), batches)
    losses = tuple((step, loss) for step, loss in metadata["held_out_losses"])
    return TrainingResult(TrainState(counter, **trees), losses, step, step)


def _is_evaluated(step: int, training: TrainingConfig) -> bool:
    every = training.evaluate_every
    return step in (0, training.steps) or (every > 0 and step % every == 0)


def _check(training: TrainingConfig) -> None:
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


def _settings(experiment: Experiment, model: ModelConfig, trained: TrainedNames) -> dict[str, Any]:
    """Everything that a checkpoint depends on, flat, by the names that users know."""
    parts = {
        "optimizer": dataclasses.asdict(experiment.optimizer),
        "training": dataclasses.asdict(experiment.training),
        "model": dataclasses.asdict(model),
    }
    settings = {f"{part}.{name}": v for part, values in parts.items() for name, v in values.items()}
    settings["data.seed"] = experiment.data.seed
    settings["trained layers"] = "".join("T" if names else "F" for names in trained.blocks)
    settings["trained parameters"] = " ".join(sorted(trained.outer.union(*trained.blocks)))
    return settings


def _refuse_other(saved: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    for name in sorted((saved.keys() | current.keys()) - _FREE_SETTINGS):
        if saved.get(name) != current.get(name):
            raise UserError(
                f"{path}: this checkpoint was trained with {name}={saved.get(name)!r}, now it is "
                f"{current.get(name)!r}; set it back or use another --workdir"
            )
