"""Training checkpoints: thin functions over Orbax V1.

One step holds four items: the pytrees `trainable` and `optimizer_state`, the Grain iterator `data`
and the JSON `metadata`. Frozen parameters are in none: they are those of the model that is trained.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from opt_deus_jax.errors import UserError

Checkpointer = ocp.training.Checkpointer
_save_policies = ocp.training.save_decision_policies
_keep_policies = ocp.training.preservation_policies


def open_checkpointer(
    directory: Path, *, save_every: int, last_step: int, keep: int
) -> Checkpointer:
    """Opens a folder of checkpoints for writing; it belongs to the caller alone.

    Args:
        directory: The folder, made where it does not exist. What a killed process left unfinished
            in it is removed.
        save_every: Steps between checkpoints.
        last_step: Saved as well.
        keep: How many of the latest are kept.

    Returns:
        A context manager that waits, on leaving, for what is being written.
    """
    when = _save_policies.AnySavePolicy(
        [
            _save_policies.FixedIntervalPolicy(save_every),
            _save_policies.SpecificStepsPolicy((last_step,)),
            _save_policies.PreemptionCheckpointingPolicy(),
        ]
    )
    return _checkpointer(directory, when, _keep_policies.LatestN(keep), remove_unfinished=True)


def latest_step(checkpointer: Checkpointer) -> int | None:
    """The step of the latest finished checkpoint, None where there is none."""
    return None if checkpointer.latest is None else checkpointer.latest.step


def save(
    checkpointer: Checkpointer,
    step: int,
    trees: Mapping[str, Any],
    data: Any,
    metadata: dict[str, Any],
) -> None:
    """Starts to write a checkpoint, and returns as soon as the caller may go on.

    Args:
        checkpointer: From `open_checkpointer`.
        step: Steps made.
        trees: Pytrees of arrays by name, which may be donated afterwards; they may have None
            holes.
        data: The Grain iterator.
        metadata: Anything that JSON holds.
    """
    items = {**trees, "data": data, "metadata": metadata}
    checkpointer.save_checkpointables_async(step, items)


def load_metadata(checkpointer: Checkpointer, step: int) -> dict[str, Any]:
    """Reads the metadata of a checkpoint."""
    return checkpointer.load_checkpointables(step, {"metadata": None})["metadata"]


def restore(
    checkpointer: Checkpointer, step: int, trees: Mapping[str, Any], data: Any
) -> dict[str, Any]:
    """Reads a checkpoint.

    Args:
        checkpointer: From `open_checkpointer`.
        step: Which one.
        trees: Pytrees of arrays like those that were saved; they are given up, and what is read
            takes their places on the devices.
        data: The Grain iterator, which is moved to where it was.

    Returns:
        The trees that were saved.
    """
    # With the shardings: Orbax would take those in the file, which name the devices of the process
    # that wrote it.
    items = {
        name: jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
        )
        for name, tree in trees.items()
    }
    for leaf in jax.tree.leaves(dict(trees)):
        leaf.delete()
    restored = checkpointer.load_checkpointables(step, {**items, "data": data})
    return {name: restored[name] for name in trees}


def load_trainable(directory: Path, trainable: Any) -> tuple[int, Any, dict[str, Any]]:
    """Reads the trained parameters of the latest checkpoint; leaves the folder as it is.

    Args:
        directory: The folder of checkpoints.
        trainable: Pytree of `jax.ShapeDtypeStruct`, each with its sharding.

    Returns:
        (step, trainable, metadata).

    Raises:
        UserError: There is no checkpoint.
    """
    missing = UserError(f"{directory}: no checkpoint here: run experiments.train first")
    if not directory.is_dir():
        raise missing
    never = _save_policies.SpecificStepsPolicy(())
    keep_all = _keep_policies.PreserveAll()
    with _checkpointer(directory, never, keep_all, remove_unfinished=False) as checkpointer:
        step = latest_step(checkpointer)
        if step is None:
            raise missing
        items = {"trainable": trainable, "metadata": None}
        restored = checkpointer.load_checkpointables(step, items)
    return step, restored["trainable"], restored["metadata"]


def _checkpointer(
    directory: Path, when: Any, preservation: Any, *, remove_unfinished: bool
) -> Checkpointer:
    # By default a dict is a pytree to Orbax, which stores its numbers as arrays.
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="metadata")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return Checkpointer(
        str(directory.absolute()),
        context=context,
        save_decision_policy=when,
        preservation_policy=preservation,
        cleanup_tmp_directories=remove_unfinished,
    )
