"""Training checkpoints: thin functions over Orbax V1.

One step holds four items: `trainable` and `optimizer` (pytrees), `data` (the Grain iterator) and
`metadata` (JSON). Frozen parameters are in none: they are those of the model that is trained.
"""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from opt_deus_jax.errors import UserError

_save_policies = ocp.training.save_decision_policies
_keep_policies = ocp.training.preservation_policies


def open_checkpointer(
    directory: Path, *, save_every: int, last_step: int, keep: int
) -> ocp.training.Checkpointer:
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
    return ocp.training.Checkpointer(
        directory.absolute(),
        save_decision_policy=_save_policies.AnySavePolicy(
            [
                _save_policies.FixedIntervalPolicy(save_every),
                _save_policies.SpecificStepsPolicy((last_step,)),
                _save_policies.PreemptionCheckpointingPolicy(),
            ]
        ),
        preservation_policy=_keep_policies.LatestN(keep),
        cleanup_tmp_directories=True,
    )


def latest_step(checkpointer: ocp.training.Checkpointer) -> int | None:
    """The step of the latest finished checkpoint, None where there is none."""
    return None if checkpointer.latest is None else checkpointer.latest.step


def save(
    checkpointer: ocp.training.Checkpointer,
    step: int,
    *,
    trainable: Any,
    optimizer_state: Any,
    data: Any,
    metadata: dict[str, Any],
) -> None:
    """Starts to write a checkpoint, and returns as soon as the caller may go on.

    Args:
        checkpointer: From `open_checkpointer`.
        step: Steps made.
        trainable: Param pytree with None for frozen leaves.
        optimizer_state: State of the optimizer.
        data: The Grain iterator.
        metadata: Anything that JSON holds.
    """
    items = {
        "trainable": trainable,
        "optimizer": optimizer_state,
        "data": data,
        "metadata": metadata,
    }
    checkpointer.save_checkpointables_async(step, items)


def load_metadata(checkpointer: ocp.training.Checkpointer, step: int) -> dict[str, Any]:
    """Reads the metadata of a checkpoint."""
    return checkpointer.load_checkpointables(step, {"metadata": None})["metadata"]


def restore(
    checkpointer: ocp.training.Checkpointer,
    step: int,
    *,
    trainable: Any,
    optimizer_state: Any,
    data: Any,
) -> tuple[Any, Any]:
    """Reads a checkpoint.

    Args:
        checkpointer: From `open_checkpointer`.
        step: Which one.
        trainable: Pytree of `jax.ShapeDtypeStruct`; those without a sharding go to the first
            device.
        optimizer_state: The same for the optimizer.
        data: The Grain iterator, which is moved to where it was.

    Returns:
        (trainable, optimizer state).
    """
    items = {"trainable": _placed(trainable), "optimizer": _placed(optimizer_state), "data": data}
    restored = checkpointer.load_checkpointables(step, items)
    return restored["trainable"], restored["optimizer"]


def load_trainable(directory: Path, trainable: Any) -> tuple[int, Any, dict[str, Any]]:
    """Reads the trained parameters of the latest checkpoint; leaves the folder as it is.

    Args:
        directory: The folder of checkpoints.
        trainable: Pytree of `jax.ShapeDtypeStruct`, as for `restore`.

    Returns:
        (step, trainable, metadata).

    Raises:
        UserError: There is no checkpoint.
    """
    missing = UserError(f"{directory}: no checkpoint here: run experiments.train first")
    if not directory.is_dir():
        raise missing
    with ocp.training.Checkpointer(
        directory.absolute(),
        save_decision_policy=_save_policies.SpecificStepsPolicy(()),
        preservation_policy=_keep_policies.PreserveAll(),
    ) as checkpointer:
        step = latest_step(checkpointer)
        if step is None:
            raise missing
        items = {"trainable": _placed(trainable), "metadata": None}
        restored = checkpointer.load_checkpointables(step, items)
    return step, restored["trainable"], restored["metadata"]


def _placed(abstract: Any) -> Any:
    # Without a sharding Orbax takes the one in the file, which names the devices of the process
    # that wrote it.
    first_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding or first_device
        ),
        abstract,
    )
