"""The training loop, from a model on disk to the last checkpoint."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from opt_deus_jax.checkpoints import orbax
from opt_deus_jax.checkpoints.lock import held_alone
from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.config import Experiment, TrainingConfig
from opt_deus_jax.data.loader import held_out_batches, training_dataset
from opt_deus_jax.data.records import Records
from opt_deus_jax.models.language_model import Params
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.training.metrics import StepMonitor, WriteMetrics, open_metrics, profiler
from opt_deus_jax.training.placement import (
    local_rows,
    put_rows,
)
from opt_deus_jax.training.preemption import Preempted, preemption_notice
from opt_deus_jax.training.program import Program, make_program, program_costs
from opt_deus_jax.training.segments import (
    TrainedNames,
    invert_mask,
)
from opt_deus_jax.training.settings import (
    refuse_other_settings,
    resolve_steps,
    settings_of,
)
from opt_deus_jax.training.step import (
    TrainState,
    initial_state,
)
from opt_deus_jax.training.weights import load_params


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
    devices: Sequence[Any],
    profiled_steps: range = range(0),
) -> TrainingResult:
    """Trains, from the latest checkpoint of the work directory where there is one.

    A run that is killed at any moment and started again ends bit for bit where an uninterrupted
    one does; on another mesh it sees the same records in the same order. All processes call this
    with the same arguments.

    Args:
        experiment: Its `data.seed`, `optimizer`, `mesh` and `training` are used.
        source: The model to train.
        trained: Its parameters that are trained.
        train_records: Training records.
        held_out_records: Held-out records.
        workdir: Gets `checkpoints/`, `metrics.jsonl` and `tensorboard/`.
        fingerprints: Names and hashes of the model and the records; others' are refused.
        devices: What to train on: all of `jax.devices()`, or some where there is one process.
        profiled_steps: Steps of which a trace goes to `profile/`.

    Returns:
        The last state and the held-out losses.

    Raises:
        UserError: A setting is out of range, the checkpoint belongs to something else, or the
            loss is not finite, or another process trains in this folder.
        Preempted: SIGTERM came; a checkpoint of the last step has been written.
    """
    training = resolve_steps(experiment.training, len(train_records))
    experiment = dataclasses.replace(experiment, training=training)
    config = read_model_config(source.hf_config, source.name)
    program = make_program(experiment, config, trained, devices)
    with jax.set_mesh(program.mesh):
        settings = settings_of(experiment, program.config, trained)
        settings |= {f"fingerprint of the {name}": value for name, value in fingerprints.items()}
        records = (train_records, held_out_records)
        return _train(experiment, source, program, records, workdir, settings, profiled_steps)


class _Run(NamedTuple):
    training: TrainingConfig
    program: Program
    checkpointer: orbax.Checkpointer
    batches: Any
    rows: tuple[int, ...]
    frozen: Params
    held_out_records: Records
    settings: dict[str, Any]


def _train(
    experiment: Experiment,
    source: CheckpointSource,
    program: Program,
    records: tuple[Records, Records],
    workdir: Path,
    settings: dict[str, Any],
    profiled_steps: range,
) -> TrainingResult:
    training, placement = experiment.training, program.placement
    rows = local_rows(placement.rows, training.batch_size)
    batches = training_dataset(
        records[0], batch_size=training.batch_size, seed=experiment.data.seed, rows=rows
    )
    load = functools.partial(load_params, source, program.config, program.segments)
    is_writer = jax.process_index() == 0
    with (
        held_alone(workdir) if is_writer else contextlib.nullcontext(),
        orbax.open_checkpointer(
            workdir / "checkpoints",
            save_every=training.checkpoint_every,
            last_step=training.steps,
            keep=training.keep_checkpoints,
        ) as checkpointer,
    ):
        trainable = load(
            dtype=jnp.dtype("float32"), shardings=program.shardings, wanted=program.mask
        )
        state = initial_state(trainable, program.optimizer, placement)
        progress = _resume(checkpointer, state, batches, settings)
        if progress.last_step == training.steps:
            if is_writer:
                tqdm.write(f"training is already finished, all {training.steps} steps are made")
            return progress
        frozen = load(
            dtype=jnp.dtype(training.frozen_dtype),
            shardings=program.shardings,
            wanted=invert_mask(program.mask),
        )
        run = _Run(training, program, checkpointer, batches, rows, frozen, records[1], settings)
        last_step = progress.last_step or -1
        with (
            open_metrics(workdir, last_step, is_writer=is_writer) as write,
            profiler(workdir, profiled_steps) as before_step,
            preemption_notice() as is_preempted,
        ):
            return _make_steps(run, progress, write, before_step, is_preempted)


def _make_steps(
    run: _Run,
    progress: TrainingResult,
    write: WriteMetrics,
    before_step: Callable[[int, Any], None],
    is_preempted: Callable[[int], bool],
) -> TrainingResult:
    training, program, start = run.training, run.program, progress.last_step
    state, losses = progress.state, progress.held_out_losses
    is_quiet = jax.process_index() > 0
    with tqdm(desc="steps", initial=start, total=training.steps, disable=is_quiet or None) as bar:
        monitor = _monitor(run, write, bar)
        for step in range(start, training.steps + 1):
            if step > start:
                before_step(step, state)
                columns = next(run.batches)
                numbers = columns.pop("record")
                batch = put_rows(columns, run.rows, len(numbers), program.placement.rows)
                state, metrics = program.train_step(state, run.frozen, batch)
                monitor.observe(step, numbers, metrics)
            if _is_evaluated(step, training) and step not in dict(losses):
                monitor.flush()
                loss = _held_out_loss(run, state.trainable)
                losses = (*losses, (step, loss))
                monitor.report_held_out(step, loss)
            if step == start:
                continue
            ends = is_preempted(step) and step < training.steps
            if ends or run.checkpointer.should_save(step):
                # Only what is known to be finite is saved.
                monitor.flush()
                _save(run, state, step, losses)
            if ends:
                raise Preempted(f"SIGTERM: stopped after step {step}, which is saved")
    return TrainingResult(state, losses, progress.resumed_from, training.steps)


def _save(run: _Run, state: TrainState, step: int, losses: tuple[tuple[int, float], ...]) -> None:
    metadata = {"settings": run.settings, "held_out_losses": losses}
    trees, loss = _saved_trees(state), dict(losses).get(step)
    orbax.save(run.checkpointer, step, trees, run.batches, metadata, loss)


def _monitor(run: _Run, write: WriteMetrics, bar: tqdm) -> StepMonitor:
    training, program = run.training, run.program
    sequence_length = run.held_out_records.sequence_length
    tokens_per_step = training.batch_size * sequence_length
    costs = program_costs(program, sequence_length)
    return StepMonitor(
        write,
        bar,
        tokens_per_step=tokens_per_step,
        model_flops_per_step=tokens_per_step * costs.model_flops,
        trained_depths=[depth for depth, names in enumerate(program.trained.blocks) if names],
        devices=list(program.mesh.devices.flat),
        log_every=training.log_every,
        latest_checkpoint=lambda: orbax.latest_step(run.checkpointer),
        is_writer=jax.process_index() == 0,
    )


def _held_out_loss(run: _Run, trainable: Params) -> float:
    """Mean cross-entropy of all held-out predictions, nats a token."""
    size = run.training.batch_size // run.training.accumulation_steps
    rows = run.program.placement.rows
    sums = []
    for columns, is_real in held_out_batches(run.held_out_records, size):
        batch = put_rows(columns | {"is_real": is_real}, range(size), size, rows)
        is_real_B = batch.pop("is_real")
        sums.append(run.program.evaluate(trainable, run.frozen, batch, is_real_B))
    nats, tokens = zip(*jax.device_get(sums), strict=True)
    return sum(map(float, nats)) / sum(map(float, tokens))


def _saved_trees(state: TrainState) -> dict[str, Any]:
    # The step is the checkpoint's own number.
    return {"trainable": state.trainable, "optimizer_state": state.optimizer_state}


def _resume(
    checkpointer: orbax.Checkpointer, state: TrainState, batches: Any, settings: dict[str, Any]
) -> TrainingResult:
    """What the latest checkpoint holds; the given state where there is none."""

    def accept(saved: orbax.SavedStep) -> None:
        refuse_other_settings(saved.metadata["settings"], settings, saved.path)

    restored = orbax.restore(checkpointer, _saved_trees(state), batches, accept)
    if restored is None:
        return TrainingResult(state, (), 0, 0)
    counter = jax.device_put(np.int32(restored.step), state.step.sharding)
    losses = tuple((step, loss) for step, loss in restored.metadata["held_out_losses"])
    state = TrainState(counter, **restored.trees)
    return TrainingResult(state, losses, restored.step, restored.step)


def _is_evaluated(step: int, training: TrainingConfig) -> bool:
    every = training.evaluate_every
    return step in (0, training.steps) or (every > 0 and step % every == 0)
