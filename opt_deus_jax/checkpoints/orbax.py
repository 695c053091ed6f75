"""Training checkpoints: thin functions over Orbax V1, on all processes together.

One step holds the state as the pytrees `trainable` and `optimizer_state`, and as JSON `data`
(where the iterator is) and `metadata`, with checksums of all. Frozen parameters are in none: they
are those of the model that is trained.
"""

import functools
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from opt_deus_jax.checkpoints.checksum import tree_checksums
from opt_deus_jax.checkpoints.saved_step import (
    METRIC,
    SavedStep,
    attempt,
    load_arrays,
    orbax_context,
    read_step,
    seal,
    step_folders,
    wrong_checksum,
)
from opt_deus_jax.errors import UserError

Checkpointer = ocp.training.Checkpointer
DAMAGED_FOLDER = "damaged_checkpoints"

_save_policies = ocp.training.save_decision_policies
_keep_policies = ocp.training.preservation_policies


class Restored(NamedTuple):
    """What `restore` found.

    Attributes:
        step: Optimizer steps made.
        trees: The pytrees by name.
        metadata: As it was given to `save`.
    """

    step: int
    trees: dict[str, Any]
    metadata: dict[str, Any]


def open_checkpointer(
    directory: Path, *, save_every: int, last_step: int, keep: int
) -> Checkpointer:
    """Opens a folder of checkpoints for writing; it belongs to the caller alone.

    Checkpoints of which all but the arrays is damaged are reported and moved to
    `damaged_checkpoints` beside the folder. One that would not be kept if it were whole is what a
    killed process left of it while it was removed: its removal is finished.

    Args:
        directory: The folder, made where it does not exist. What a killed process left unfinished
            in it is removed.
        save_every: Steps between checkpoints.
        last_step: Saved as well.
        keep: How many of the latest are kept, beside the one with the lowest held-out loss.

    Returns:
        A context manager that waits, on leaving, for what is being written.

    Raises:
        UserError: There are checkpoints, and all are damaged; they stay where they are.
    """
    damaged, outlived = _find_damage(directory, keep)
    _set_aside(damaged)
    _remove(outlived)
    # Any: Orbax's own policies do not have the types that its Checkpointer asks for.
    when: Any = _save_policies.AnySavePolicy(
        [
            _save_policies.FixedIntervalPolicy(save_every),
            _save_policies.SpecificStepsPolicy((last_step,)),
        ]
    )
    best = _keep_policies.BestN(
        get_metric_fn=lambda metrics: metrics[METRIC],
        # Orbax keeps the end of the list.
        reverse=True,
        n=1,
        keep_checkpoints_without_metrics=False,
    )
    kept: Any = _keep_policies.AnyPreservationPolicy([_keep_policies.LatestN(keep), best])
    return Checkpointer(
        str(directory.absolute()),
        context=orbax_context(),
        save_decision_policy=when,
        preservation_policy=kept,
        cleanup_tmp_directories=True,
    )


def latest_step(checkpointer: Checkpointer) -> int | None:
    """The step of the latest checkpoint, None where there is none."""
    return None if checkpointer.latest is None else checkpointer.latest.step


def best_step(checkpointer: Checkpointer) -> int | None:
    """The step with the lowest held-out loss, the later of equals; None where none has one."""
    return _best(_losses(checkpointer))


def _losses(checkpointer: Checkpointer) -> dict[int, float]:
    metrics: dict[int, Any] = {c.step: c.metrics for c in checkpointer.checkpoints if c.metrics}
    return {step: values[METRIC] for step, values in metrics.items()}


def _best(losses: Mapping[int, float]) -> int | None:
    return min(losses, key=lambda step: (losses[step], -step), default=None)


def save(
    checkpointer: Checkpointer,
    step: int,
    trees: Mapping[str, Any],
    data: Any,
    metadata: dict[str, Any],
    held_out_loss: float | None,
) -> None:
    """Starts to write a checkpoint, and returns as soon as the caller may go on.

    Args:
        checkpointer: From `open_checkpointer`; its `should_save(step)` says when to save, but any
            step after the latest may be saved.
        step: Steps made.
        trees: Pytrees of arrays by name, which may be donated afterwards; they may have None
            holes.
        data: The iterator, at the same place on all processes: its `get_state()` is JSON.
        metadata: Anything that JSON holds.
        held_out_loss: That of this step; with None, or a number that is not finite, it is no
            candidate for the best.
    """
    if held_out_loss is not None and not math.isfinite(held_out_loss):
        held_out_loss = None
    losses = {} if held_out_loss is None else {step: held_out_loss}
    sealed, place = seal(
        {
            "metadata": metadata,
            "data": data.get_state(),
            METRIC: held_out_loss,
            "best": _best(_losses(checkpointer) | losses),
            "checksums": tree_checksums(dict(trees)),
        }
    )
    checkpointer.save_checkpointables_async(
        step,
        {**trees, "data": place, "metadata": sealed},
        force=True,
        metrics=None if held_out_loss is None else {METRIC: held_out_loss},
    )


def restore(
    checkpointer: Checkpointer,
    trees: Mapping[str, Any],
    data: Any,
    accept: Callable[[SavedStep], None],
) -> Restored | None:
    """Reads the latest checkpoint that is whole, the same on all processes.

    Damaged ones after it are reported and moved to `damaged_checkpoints` beside the folder. Where
    none is whole all stay where they are.

    Args:
        checkpointer: From `open_checkpointer`.
        trees: Pytrees like those that were saved: arrays, which are given up where there is a
            checkpoint, or `jax.ShapeDtypeStruct`. They have shardings, which need not be those
            that were saved.
        data: The iterator, which is moved to where it was.
        accept: Raises `UserError` for a checkpoint that belongs to something else.

    Returns:
        None where there is no checkpoint.

    Raises:
        UserError: All checkpoints are damaged.
    """
    # With the shardings: Orbax would take those in the file, which name the devices of the process
    # that wrote it.
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        dict(trees),
    )
    damaged: list[tuple[Path, str]] = []
    for checkpoint in reversed(checkpointer.checkpoints):
        folder = Path(str(checkpoint.path))
        saved, reason = attempt(functools.partial(read_step, folder))
        reason = _agree(reason)
        restored = None
        if saved is not None and reason is None:
            accept(saved)
            _give_up(trees)
            restored, reason = attempt(functools.partial(load_arrays, saved, abstract))
            reason = _agree(reason) or wrong_checksum(restored, saved)
        if saved is not None and restored is not None and reason is None:
            _set_aside(damaged)
            checkpointer.reload()
            data.set_state(saved.data)
            return Restored(saved.step, restored, saved.metadata)
        _give_up(restored)
        damaged.append((folder, str(reason)))
    if damaged:
        raise _all_damaged(Path(str(checkpointer.directory)), damaged)
    return None


def _agree(reason: str | None) -> str | None:
    """One answer on all processes: the reason of any of them that has one."""
    if jax.process_count() == 1:
        return reason
    failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray(reason is not None)))
    if not failed.size:
        return None
    return reason or f"process {failed[0]} cannot read it"


def _find_damage(directory: Path, keep: int) -> tuple[list[tuple[Path, str]], list[Path]]:
    """Returns (damaged checkpoints with reasons, what is left of removed ones)."""
    whole: list[SavedStep] = []
    damaged: list[tuple[Path, str]] = []
    outlived: list[Path] = []
    for folder in reversed(step_folders(directory)):
        saved, reason = attempt(functools.partial(read_step, folder))
        reason = _agree(reason)
        if saved is not None and reason is None:
            whole.append(saved)
        elif len(whole) >= keep and whole[0].best != int(folder.name):
            outlived.append(folder)
        else:
            damaged.insert(0, (folder, str(reason)))
    if damaged and not whole:
        raise _all_damaged(directory, damaged)
    return damaged, outlived


def _give_up(trees: Any) -> None:
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, jax.Array):
            leaf.delete()


def _all_damaged(directory: Path, damaged: Sequence[tuple[Path, str]]) -> UserError:
    reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in damaged)
    return UserError(
        f"{directory}: every checkpoint is damaged ({reasons}); put back a whole one, or remove "
        "the folder to train from the start"
    )


def _remove(folders: Sequence[Path]) -> None:
    if not folders:
        return
    if jax.process_index() == 0:
        for folder in folders:
            shutil.rmtree(folder)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("removals that were cut short are finished")


def _set_aside(damaged: Sequence[tuple[Path, str]]) -> None:
    """Moves damaged checkpoints out of the way; nothing that was saved is deleted."""
    if not damaged:
        return
    if jax.process_index() == 0:
        for folder, reason in damaged:
            kept_in = folder.parent.parent / DAMAGED_FOLDER
            kept_in.mkdir(exist_ok=True)
            earlier = len(list(kept_in.glob(f"{folder.name}*")))
            target = kept_in / (f"{folder.name}_{earlier + 1}" if earlier else folder.name)
            folder.rename(target)
            tqdm.write(
                f"{folder}: this checkpoint is damaged ({reason}) and not used; it is now {target}",
                file=sys.stderr,
            )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
