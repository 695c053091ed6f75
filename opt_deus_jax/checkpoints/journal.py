"""Folders whose making may be killed at any moment and is taken up where it was."""

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opt_deus_jax.checkpoints.hf import Shard, check_room, hash_array
from opt_deus_jax.checkpoints.lock import lock
from opt_deus_jax.errors import UserError

FILE_NAME = "unfinished.jsonl"
_BYTES_AT_ONCE = 2**24


class Journal:
    """What of an unfinished folder is written: a line of JSON for each tensor, after one for all.

    A tensor counts when its line and its bytes are whole. Nothing need be durable for that: what a
    crash of the machine has lost is found by its hash, and made again.
    """

    def __init__(self, path: Path):
        """Opens the journal and keeps every other process from it.

        Args:
            path: The file; made where there is none.

        Raises:
            UserError: Another process has it.
        """
        self._file = path.open("a+b")
        try:
            lock(self._file, f"{path.parent}: another process is writing it; wait for it or end it")
        except UserError:
            self._file.close()
            raise
        self._file.seek(0)
        self._lines: list[dict[str, Any]] = []
        self._ends: list[int] = []
        for line in self._file:
            # The last one may have been cut short.
            try:
                self._lines.append(json.loads(line))
            except (json.JSONDecodeError, UnicodeDecodeError):
                break
            self._ends.append(sum(self._ends[-1:]) + len(line))

    @property
    def made_from(self) -> dict[str, Any]:
        """What the folder was begun with; empty in a new one."""
        return self._lines[0] if self._lines else {}

    def begin(self, made_from: Mapping[str, Any]) -> None:
        """Forgets all, and writes down what the folder is made from."""
        self._file.truncate(0)
        self._file.write(_encoded(made_from))
        self._file.flush()
        self._lines, self._ends = [dict(made_from)], [self._file.tell()]

    def keep_written(self, directory: Path, shards: Sequence[Shard]) -> dict[str, dict[str, Any]]:
        """Checks what is written, and forgets what comes after the first tensor that is not whole.

        Args:
            directory: The folder.
            shards: Its files.

        Returns:
            What was noted of the tensors that are whole, in the order of writing.
        """
        lines = {line["tensor"]: line for line in self._lines[1:]}
        kept: dict[str, dict[str, Any]] = {}
        for shard in shards:
            whole = _whole_tensors(directory / shard.file, shard, lines)
            kept |= {name: lines[name] for name in whole}
            if len(whole) < len(shard.tensors):
                break
        # Lines are in the order of writing: those that are kept come first.
        self._file.truncate(self._ends[len(kept)])
        return {name: line["note"] for name, line in kept.items()}

    def keep_none(self) -> dict[str, dict[str, Any]]:
        """Forgets all that is written; `keep_written` of nothing."""
        self._file.truncate(self._ends[0])
        return {}

    def append(self, tensor: str, array: np.ndarray, note: Mapping[str, Any]) -> None:
        """Adds a tensor that is in its file, with what must be known of it if it is kept."""
        line = {"tensor": tensor, "sha256": hash_array(array), "note": note}
        self._file.write(_encoded(line))
        self._file.flush()

    def close(self) -> None:
        """Lets other processes have it."""
        self._file.close()


def _encoded(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def _whole_tensors(path: Path, shard: Shard, lines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The tensors at the beginning of a file whose bytes are those that were noted."""
    whole: list[str] = []
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        if file.read(len(shard.header)) != shard.header:
            return whole
        for name, _, size in shard.places():
            digest = hashlib.sha256()
            while size and (part := file.read(min(size, _BYTES_AT_ONCE))):
                digest.update(part)
                size -= len(part)
            if size or name not in lines or lines[name]["sha256"] != digest.hexdigest():
                break
            whole.append(name)
    return whole


def _first_difference(before: Any, now: Any, path: str = "") -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                return _first_difference(
                    before.get(key), now.get(key), f"{path}.{key}" if path else key
                )
    return path


def is_finished(directory: Path) -> bool:
    """Whether a folder has been made; clears away what a kill in its last moment has left."""
    (directory / FILE_NAME).unlink(missing_ok=True)
    return directory.exists()


def create_resumable(
    directory: Path,
    num_bytes: int,
    made_from: Mapping[str, Any],
    fill: Callable[[Path, Journal], None],
    say: Callable[[str], None],
) -> None:
    """Fills a folder under a temporary name, which a killed run leaves for the next to go on with.

    Args:
        directory: The folder to make; must not exist.
        num_bytes: Room that it will need.
        made_from: JSON of all that its content depends on. What was begun with another is made
            anew.
        fill: Writes what the journal does not have into the folder that it is given.
        say: Told of what is thrown away.

    Raises:
        UserError: The folder exists, another process is making it, the disk has no room, or `fill`
            refuses. Only after the second and third is anything left: what is whole by then.
    """
    if is_finished(directory):
        raise UserError(f"{directory}: exists; delete it or choose another --workdir")
    partial = directory.with_name(directory.name + ".partial")
    held = sum(path.stat().st_size for path in partial.glob("*")) if partial.exists() else 0
    check_room(directory, num_bytes, held)
    partial.mkdir(parents=True, exist_ok=True)
    journal = Journal(partial / FILE_NAME)
    made_from = json.loads(json.dumps(made_from))
    try:
        if journal.made_from != made_from:
            if journal.made_from:
                field = _first_difference(journal.made_from, made_from)
                say(f"{partial}: was begun with another {field}; it is made anew")
            journal.begin(made_from)
            for path in partial.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != FILE_NAME:
                    path.unlink()
        fill(partial, journal)
        partial.rename(directory)
        journal.close()
        is_finished(directory)
    except UserError:
        # Network file systems keep a file that is open.
        journal.close()
        shutil.rmtree(partial)
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"{directory}: no space left on the device, {num_bytes:,} bytes are needed; free "
                "some and start again: what is whole is kept"
            ) from None
        raise
    finally:
        journal.close()
