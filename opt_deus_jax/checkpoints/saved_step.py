"""Reading one training checkpoint, with every byte checked."""

import contextlib
import functools
import gc
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

from opt_deus_jax.checkpoints.checksum import json_checksum, tree_checksums
from opt_deus_jax.errors import UserError

# In an abstract tree: a leaf that is not to be read.
NOT_READ = ocp.PLACEHOLDER
METRIC = "held_out_loss"

# Errors that say nothing about the files.
_NOT_DAMAGE = (UserError, MemoryError, PermissionError, jax.errors.JaxRuntimeError)
_Value = TypeVar("_Value")


class SavedStep(NamedTuple):
    """A checkpoint, all but its arrays.

    Attributes:
        step: Optimizer steps made.
        path: Its folder.
        metadata: As it was given when it was saved.
        data: State of the iterator.
        held_out_loss: That of this step, None where there is none.
        best: The step with the lowest held-out loss when this one was saved, None where none had
            one.
        checksums: Of each array, by its path in the tree.
    """

    step: int
    path: Path
    metadata: dict[str, Any]
    data: Any
    held_out_loss: float | None
    best: int | None
    checksums: dict[str, int]


def seal(content: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Makes the JSON items of a checkpoint.

    Args:
        content: The fields of `SavedStep` by name, without step and path.

    Returns:
        (the item `metadata`, the item `data`), as they will be read: lists for tuples.
    """
    content = json.loads(json.dumps(content))
    content["sha256"] = json_checksum(content)
    return content, content.pop("data")


def read_step(folder: Path) -> SavedStep:
    """Reads all but the arrays of a checkpoint.

    Args:
        folder: That of the checkpoint, named by its step.

    Raises:
        Exception: Of many kinds: it is damaged; see `attempt`.
    """
    metadata, data = (_read_json(folder / item / "data.json") for item in ("metadata", "data"))
    content = metadata | {"data": data}
    if content.pop("sha256", None) != json_checksum(content):
        raise ValueError("the sha256 of its metadata does not match")
    loss = content[METRIC]
    # Orbax reads the next two files of every step when it opens a folder.
    metrics = folder / "metrics" / "metrics"
    written = _read_json(metrics) if metrics.exists() else {}
    if written != ({} if loss is None else {METRIC: loss}):
        raise ValueError("its file of metrics does not match its metadata")
    _read_json(folder / "_CHECKPOINT_METADATA")
    found = ocp.path.step.standard_name_format().find_step(str(folder.parent), int(folder.name))
    if not found.commit_timestamp:
        raise ValueError("its _CHECKPOINT_METADATA has no time")
    return SavedStep(step=int(folder.name), path=folder, **content)


def find_step(directory: Path, which: str) -> SavedStep:
    """Finds a checkpoint; leaves the folder as it is.

    Args:
        directory: The folder of checkpoints.
        which: `latest`, `best` (the lowest held-out loss, the later of equals) or a step.

    Returns:
        The checkpoint, without its arrays.

    Raises:
        UserError: There is no such checkpoint, or it is damaged.
    """
    folders = {folder.name: folder for folder in step_folders(directory)}
    if not folders:
        raise UserError(f"{directory}: no checkpoint here: run experiments.train first")
    there = f"there are checkpoints of the steps {', '.join(folders)}"
    if which == "best":
        ranked = [
            (saved.held_out_loss, -saved.step, saved)
            for saved in _candidates(list(folders.values()), there)
            if saved.held_out_loss is not None
        ]
        if not ranked:
            raise UserError(
                f"{directory}: --checkpoint=best: none was saved with a held-out loss; {there}"
            )
        return min(ranked)[-1]
    name = list(folders)[-1] if which == "latest" else which
    if name not in folders:
        raise UserError(
            f"{directory}: --checkpoint={which}: no such step; {there}, or use latest or best"
        )
    return _read_or_refuse(folders[name], there)


def _candidates(folders: Sequence[Path], there: str) -> list[SavedStep]:
    """Reads all checkpoints but those whose removal was cut short: they are not the best."""
    steps, best = [], None
    for folder in reversed(folders):
        saved = attempt(functools.partial(read_step, folder))[0] if steps else None
        if saved is None and (not steps or int(folder.name) == best):
            saved = _read_or_refuse(folder, there)
        if saved is not None:
            steps.append(saved)
            best = steps[0].best
    return steps


def load_some(saved: SavedStep, trees: Mapping[str, Any]) -> dict[str, Any]:
    """Reads arrays of a checkpoint into one process, and no more than is asked for.

    Args:
        saved: From `find_step`.
        trees: Pytrees by name, like those that were saved, of `jax.ShapeDtypeStruct`, each with
            its sharding, and `NOT_READ`.

    Returns:
        Pytrees of arrays, and `NOT_READ`.

    Raises:
        UserError: The checkpoint is damaged.
    """
    restored, reason = attempt(lambda: load_arrays(saved, dict(trees)))
    reason = reason or wrong_checksum(restored, saved)
    if restored is None or reason:
        raise UserError(f"{saved.path}: this checkpoint is damaged ({reason}); use another one")
    return restored


def load_arrays(saved: SavedStep, abstract: dict[str, Any]) -> dict[str, Any]:
    """Reads the arrays that this process holds; its errors are its own.

    Args:
        saved: From `read_step`.
        abstract: As for `load_some`.

    Returns:
        Pytrees of arrays, not yet compared to their checksums.

    Raises:
        Exception: Of many kinds: it is damaged; see `attempt`.
    """
    context = orbax_context()
    # No barriers: where one process fails, the others would wait there.
    context.multiprocessing.active_processes = {jax.process_index()}
    context.multiprocessing.primary_host = jax.process_index()
    with context:
        return ocp.load_checkpointables(str(saved.path), abstract)


def wrong_checksum(trees: Any, saved: SavedStep) -> str | None:
    """Names an array that differs from what was saved; all processes compute this together."""
    read = jax.tree.map(lambda leaf: None if leaf is NOT_READ else leaf, trees)
    for name, checksum in tree_checksums(read).items():
        if saved.checksums.get(name) != checksum:
            return f"the checksum of {name} does not match"
    return None


def attempt(read: Callable[[], _Value]) -> tuple[_Value | None, str | None]:
    """What `read` returns, or what shows that the files are damaged."""
    with _quiet_after_errors():
        try:
            return read(), None
        except Exception as error:
            reason = _explain(error)
            if reason is None:
                raise
        gc.collect()
    return None, reason


def step_folders(directory: Path) -> list[Path]:
    """The folders of all checkpoints, damaged ones too, by step."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def orbax_context() -> ocp.Context:
    """How this package saves and loads through Orbax."""
    # By default a dict is a pytree to Orbax, which stores its numbers as arrays.
    registry = ocp.handlers.local_registry()
    for name in ("metadata", "data"):
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


@contextlib.contextmanager
def _quiet_after_errors() -> Iterator[None]:
    # After an error Orbax drops coroutines and tasks, each of which would print a traceback beside
    # the one line that says what is wrong.
    logger = logging.getLogger("asyncio")
    level, hook = logger.level, sys.unraisablehook
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        logger.setLevel(logging.CRITICAL)
        sys.unraisablehook = lambda _: None
        try:
            yield
        finally:
            logger.setLevel(level)
            sys.unraisablehook = hook


def _explain(error: BaseException) -> str | None:
    """A line on what is damaged, None for an error that says nothing about the files."""
    # Orbax calls every error, even a lack of memory, an incompatible handler.
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, _NOT_DAMAGE) or not isinstance(error, Exception):
        return None
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def _read_or_refuse(folder: Path, there: str) -> SavedStep:
    saved, reason = attempt(lambda: read_step(folder))
    if saved is None:
        raise UserError(f"{folder}: this checkpoint is damaged ({reason}); {there}")
    return saved
