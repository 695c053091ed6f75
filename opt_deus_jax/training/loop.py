"""The training loop, from a model on disk to the last checkpoint."""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
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
from opt_deus_jax.models.model_config import ModelConfig, read_model_config
from opt_deus_jax.training.metrics import WriteMetrics, open_metrics
from opt_deus_jax.training.optimizer import learning_rate_schedule, make_optimizer
from opt_deus_jax.training.segments import invert_mask, partition, plan_segments, trained_mask
from opt_deus_jax.training.step import (
    Evaluate,
    Metrics,
    TrainState,
    initial_state,
    make_evaluation_loss,
    make_train_step,
)
from opt_deus_jax.training.weights import abstract_params, load_params

# Settings that may change when a training is taken up again: they do not change what is computed.
_FREE_SETTINGS = frozenset(
    [
        "training.log_every",
        "training.evaluate_every",
        "training.checkpoint_every",
        "training.keep_checkpoints",
    ]
)


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What a finished training leaves.

    Attributes:
        state: The last state; the frozen parameters are those of the source.
        step: Optimizer steps made.
        held_out_losses: (step, nats a token) of every held-out loss, from step 0 to the last.
        resumed_from: Step of the checkpoint that this run began with; None for a fresh start, and
            equal to `step` where there was nothing left to do.
    """

    state: TrainState
    step: int
    held_out_losses: tuple[tuple[int, float], ...]
    resumed_from: int | None


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
        fingerprints: What tells this model and these records from others, by what users know it
            as (such as "model" and "records"); checkpoints of others are refused.

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
    batches = training_dataset(
        train_records, batch_size=training.batch_size, seed=experiment.data.seed
    )
    settings = _settings(experiment, config, trained_by_depth, trained, fingerprints)
    held_out_losses: list[tuple[int, float]] = []

    with orbax.open_checkpointer(
        workdir / "checkpoints",
        save_every=training.checkpoint_every,
        last_step=training.steps,
        keep=training.keep_checkpoints,
    ) as checkpointer:
        start = orbax.latest_step(checkpointer)
        if start is None:
            trainable = load_params(
                source, config, segments, dtype=jnp.dtype("float32"), wanted=mask
            )
            state = initial_state(trainable, optimizer)
        else:
            metadata = orbax.load_metadata(checkpointer, start)
            _refuse_other(metadata["settings"], settings, workdir / "checkpoints" / str(start))
            held_out_losses = [(step, loss) for step, loss in metadata["held_out_losses"]]
            abstract, _ = partition(abstract_params(config, segments, jnp.dtype("float32")), mask)
            abstract = jax.eval_shape(lambda params: initial_state(params, optimizer), abstract)
            trainable, optimizer_state = orbax.restore(
                checkpointer,
                start,
                trainable=abstract.trainable,
                optimizer_state=abstract.optimizer_state,
                data=batches,
            )
            state = TrainState(jnp.asarray(start, jnp.int32), trainable, optimizer_state)
        if start == training.steps:
            tqdm.write(f"{workdir}: training is finished: all {start} steps are made")
            return TrainingResult(state, start, tuple(held_out_losses), start)
        frozen = load_params(
            source,
            config,
            segments,
            dtype=jnp.dtype(training.frozen_dtype),
            wanted=invert_mask(mask),
        )
        with open_metrics(workdir, -1 if start is None else start) as write:
            report = _Reporter(write, training, train_records, workdir, start)
            for step in range(0 if start is None else start + 1, training.steps + 1):
                if step > 0:
                    batch = next(batches)
                    state, metrics = train_step(state, frozen, jnp.asarray(batch["tokens"]))
                    report(step, batch["record"], metrics)
                ...
    return TrainingResult(state, training.steps, tuple(held_out_losses), start)
