"""The training loop, from a model on disk to the last checkpoint."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from opt_deus_jax.checkpoints import orbax
from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.config import Experiment, TrainingConfig
from opt_deus_jax.data.loader import held_out_batches, training_dataset
from opt_deus_jax.data.records import Records
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.language_model import Params
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.training.metrics import StepMonitor, open_metrics
from opt_deus_jax.training.optimizer import learning_rate_schedule, make_optimizer
from opt_deus_jax.training.segments import invert_mask, plan_segments, trained_mask
from opt_deus_jax.training.step import (
    Evaluate,
    TrainState,
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
    trained_by_depth: Sequence[bool],
    trained: str,
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
        trained_by_depth: Whether each of its layers is trained.
        trained: `new`, or `all` to train embedding, final norm and head as well.
        train_records: Training records.
        held_out_records: Held-out records.
        workdir: Gets `checkpoints/`, `metrics.jsonl` and `tensorboard/`.
        fingerprints: What tells this model and these records from others, each by a name that
            users understand; checkpoints of others are refused.

    Returns:
        The last state and the held-out losses.

    Raises:
        UserError: A setting is out of range, the checkpoint belongs to something else, or the
            loss is not finite.
    """
    training = experiment.training
    _check(training)
    config = read_model_config(source.hf_config, source.name)
    segments = plan_segments(trained_by_depth)
    mask = trained_mask(config, segments, trained)
    schedule = learning_rate_schedule(experiment.optimizer, training.steps)
    optimizer = make_optimizer(experiment.optimizer, schedule)
    train_step = make_train_step(config, training, optimizer, schedule)
    evaluate = make_evaluation_loss(config, training)
    seed, batch_size = experiment.data.seed, training.batch_size
    batches = training_dataset(train_records, batch_size=batch_size, seed=seed)
    settings = _settings(experiment, dataclasses.asdict(config), trained_by_depth, trained)
    settings |= {f"fingerprint of the {name}": value for name, value in fingerprints.items()}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    load = functools.partial(load_params, source, config, segments, sharding=device)

    with orbax.open_checkpointer(
        workdir / "checkpoints",
        save_every=training.checkpoint_every,
        last_step=training.steps,
        keep=training.keep_checkpoints,
    ) as checkpointer:
        trainable = load(dtype=jnp.dtype("float32"), wanted=mask)
        # Everything is put on its device by name: what is not would be compiled for once more
        # after the first step of a resumed run.
        state = jax.device_put(initial_state(trainable, optimizer), device)
        state, start, losses = _resume(checkpointer, state, batches, settings)
        if start == training.steps:
            tqdm.write(f"{workdir}: training is already finished, all {start} steps are made")
            return TrainingResult(state, losses, start, start)
        frozen = load(dtype=jnp.dtype(training.frozen_dtype), wanted=invert_mask(mask))

        with open_metrics(workdir, last_step=start or -1) as write, _bar(start, training) as bar:
            monitor = StepMonitor(
                write,
                bar,
                tokens_per_step=batch_size * train_records.sequence_length,
                log_every=training.log_every,
                latest_checkpoint=lambda: orbax.latest_step(checkpointer),
            )
            for step in range(start, training.steps + 1):
                if step > start:
                    batch = next(batches)
                    tokens_BL = jax.device_put(batch["tokens"], device)
                    state, metrics = train_step(state, frozen, tokens_BL)
                    monitor.observe(step, batch["record"], metrics)
                if _is_evaluated(step, training) and step not in dict(losses):
                    monitor.flush()
                    loss = held_out_loss(
                        evaluate, state.trainable, frozen, held_out_records, training
                    )
                    losses = (*losses, (step, loss))
                    monitor.report_held_out(step, loss)
                if step > start and checkpointer.should_save(step):
                    # Only what is known to be finite is saved.
                    monitor.flush()
                    metadata = {"settings": settings, "held_out_losses": losses}
                    orbax.save(checkpointer, step, _saved_trees(state), batches, metadata)
    return TrainingResult(state, losses, start, training.steps)


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
    checkpointer: orbax.Checkpointer,
    state: TrainState,
    batches: Any,
    settings: dict[str, Any],
) -> tuple[TrainState, int, tuple[tuple[int, float], ...]]:
    """The latest state, its step and the held-out losses up to it; the given state at step 0."""
    step = orbax.latest_step(checkpointer)
    if step is None:
        return state, 0, ()
    metadata = orbax.load_metadata(checkpointer, step)
    _refuse_other(metadata["settings"], settings, Path(checkpointer.directory) / str(step))
    counter = jax.device_put(np.asarray(step, np.int32), state.step.sharding)
    trees = orbax.restore(checkpointer, step, _saved_trees(state), batches)
    losses = tuple((step, loss) for step, loss in metadata["held_out_losses"])
    return TrainState(counter, **trees), step, losses


def _bar(start: int, training: TrainingConfig) -> tqdm:
    return tqdm(desc="steps", initial=start, total=training.steps, disable=None)


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


def _settings(
    experiment: Experiment, model: dict[str, Any], trained_by_depth: Sequence[bool], trained: str
) -> dict[str, Any]:
    """Everything that a checkpoint depends on, flat, by the names that users know."""
    parts = {
        "optimizer": dataclasses.asdict(experiment.optimizer),
        "training": dataclasses.asdict(experiment.training),
        "model": model,
    }
    settings = {f"{part}.{name}": v for part, values in parts.items() for name, v in values.items()}
    settings["data.seed"] = experiment.data.seed
    settings["upscale.trained"] = trained
    settings["trained layers"] = "".join(
        "T" if is_trained else "F" for is_trained in trained_by_depth
    )
    return settings


def _refuse_other(saved: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    for name in sorted((saved.keys() | current.keys()) - _FREE_SETTINGS):
        if saved.get(name) != current.get(name):
            raise UserError(
                f"{path}: this checkpoint was trained with {name}={saved.get(name)!r}, now it is "
                f"{current.get(name)!r}; set it back or use another --workdir"
            )
