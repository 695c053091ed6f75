"""Folders whose making may be killed at any moment and is taken up where it was."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from opt_deus_jax.checkpoints.hf import Shard, check_room, hash_array, naming_full_disk
from opt_deus_jax.checkpoints.lock import lock
from opt_deus_jax.distributed.team import ALONE, Team
from opt_deus_jax.errors import ResumableError, UserError

# Says what the folder is made from, and keeps others out. Beside each file of weights another,
# `<file>.unfinished.jsonl`, has a line for each tensor: whoever writes the file next may go on.
FILE_NAME = "unfinished.jsonl"
_BYTES_AT_ONCE = 2**24
_T = TypeVar("_T")
Append = Callable[[str, np.ndarray, Mapping[str, Any]], None]


def _path(directory: Path, shard: Shard) -> Path:
    return directory / f"{shard.file}.{FILE_NAME}"


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The lines of a journal that are whole, and where each ends."""
    lines: list[dict[str, Any]] = []
    ends = [0]
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            # The last one may have been cut short, if only by what ends it.
            if not line.endswith(b"\n"):
                break
            try:
                lines.append(json.loads(line))
            except (json.JSONDecodeError, UnicodeDecodeError):
                break
            ends.append(ends[-1] + len(line))
    return lines, ends


def _encoded(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def _whole_tensors(path: Path, shard: Shard, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tensors at the beginning of a file whose bytes are those that were noted."""
    noted = {line["tensor"]: line["sha256"] for line in lines}
    whole: list[str] = []
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        if file.read(len(shard.header)) != shard.header:
            return whole
        for name, _, size in shard.places():
            digest = hashlib.sha256()
            while size and (part := file.read(min(size, _BYTES_AT_ONCE))):
                digest.update(part)
                size -= len(part)
            if size or noted.get(name) != digest.hexdigest():
                break
            whole.append(name)
    return whole


def keep_written(directory: Path, shard: Shard) -> dict[str, dict[str, Any]]:
    """Checks what is written of a file, and forgets what comes after the first damage.

    A tensor counts when its line and its bytes are whole. Nothing need be durable for that: what a
    crash of the machine has lost is found by its hash, and made again.

    Args:
        directory: The folder.
        shard: The file.

    Returns:
        What was noted of the tensors that are whole, in the order of writing.
    """
    path = _path(directory, shard)
    lines, ends = _read_lines(path)
    whole = _whole_tensors(directory / shard.file, shard, lines)
    if path.exists():
        # Lines are in the order of writing: those that are kept come first.
        os.truncate(path, ends[len(whole)])
    return {line["tensor"]: line["note"] for line in lines[: len(whole)]}


def forget(directory: Path, shard: Shard) -> None:
    """Forgets all that is written of a file."""
    _path(directory, shard).unlink(missing_ok=True)


@contextlib.contextmanager
def journal_of(directory: Path, shard: Shard) -> Iterator[Append]:
    """Opens the journal of a file.

    Args:
        directory: The folder.
        shard: The file.

    Yields:
        What adds a tensor that is in the file, with what must be known of it if it is kept.
    """
    with _path(directory, shard).open("ab") as file:

        def append(tensor: str, array: np.ndarray, note: Mapping[str, Any]) -> None:
            file.write(_encoded({"tensor": tensor, "sha256": hash_array(array), "note": note}))
            file.flush()

        yield append


def read_notes(directory: Path, shards: Sequence[Shard]) -> list[dict[str, Any]]:
    """What was noted of all tensors of some files, in the order of writing.

    Args:
        directory: The folder.
        shards: Files that are written.

    Raises:
        ResumableError: A note is missing.
    """
    notes: list[dict[str, Any]] = []
    for shard in shards:
        path = _path(directory, shard)
        lines, _ = _read_lines(path)
        if [line["tensor"] for line in lines] != [name for name, _ in shard.tensors]:
            raise ResumableError(
                f"{path}: has notes of {len(lines)} of {len(shard.tensors)} tensors; does this "
                "file system show what other machines wrote? Start again: what is whole is kept"
            )
        notes += [line["note"] for line in lines]
    return notes


def count_written(directory: Path) -> int:
    """How many tensors of a folder that is being made are in their files."""
    written = 0
    for path in directory.glob(f"*.{FILE_NAME}"):
        # The folder may get its name just now.
        with contextlib.suppress(FileNotFoundError):
            written += path.read_bytes().count(b"\n")
    return written


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
    for path in directory.glob(f"*{FILE_NAME}"):
        path.unlink(missing_ok=True)
    return directory.exists()


def _hold(partial: Path) -> IO[bytes]:
    """Opens the partial folder's own journal, and keeps every other program from it."""
    file = (partial / FILE_NAME).open("a+b")
    try:
        lock(file, f"{partial}: another process is writing it; wait for it or end it")
    except UserError:
        file.close()
        raise
    return file


def _begin(partial: Path, made_from: Any, file: IO[bytes], say: Callable[[str], None]) -> None:
    """Clears away what was begun from something else, and writes down what is begun now."""
    made_from = json.loads(json.dumps(made_from))
    lines, _ = _read_lines(partial / FILE_NAME)
    if lines[:1] == [made_from]:
        return
    if lines:
        field = _first_difference(lines[0], made_from)
        say(f"{partial}: was begun with another {field}; it is made anew")
    file.truncate(0)
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != FILE_NAME:
            path.unlink()
    file.write(_encoded(made_from))
    file.flush()


def create_resumable(
    directory: Path,
    num_bytes: int,
    made_from: Mapping[str, Any],
    fill: Callable[[Path], None],
    finish: Callable[[Path], _T],
    say: Callable[[str], None],
    team: Team = ALONE,
) -> _T:
    """Fills a folder under a temporary name, which a killed run leaves for the next to go on with.

    Args:
        directory: The folder to make; must not exist. All processes see it.
        num_bytes: Room that it will need.
        made_from: JSON of all that its content depends on; with another, all is made anew.
        fill: Writes this process's share of what journals do not have into the folder it is given.
        finish: Called when all have done that.
        say: Told of what is thrown away.
        team: The processes that fill it.

    Returns:
        What `finish` returned.

    Raises:
        UserError: The folder exists, another program is making it, the disk has no room, or `fill`
            or `finish` refuses. Only after the second and third, and after any other
            `ResumableError`, is something left: what is whole by then.
    """
    partial = directory.with_name(directory.name + ".partial")
    full_disk = naming_full_disk(
        directory, num_bytes, "free some and start again: what is whole is kept", ResumableError
    )
    with contextlib.ExitStack() as held:

        @full_disk
        def begin() -> None:
            if is_finished(directory):
                raise UserError(f"{directory}: exists; delete it or choose another --workdir")
            there = sum(path.stat().st_size for path in partial.glob("*"))
            check_room(directory, num_bytes, there)
            partial.mkdir(exist_ok=True)
            _begin(partial, made_from, held.enter_context(_hold(partial)), say)

        team.run(begin if team.is_first else lambda: None)
        try:
            team.run(lambda: full_disk(fill)(partial))
            made = team.run(lambda: full_disk(finish)(partial))
        except ResumableError:
            raise
        except UserError:
            if team.is_first:
                # Network file systems keep a file that is open.
                held.close()
                shutil.rmtree(partial)
            raise
        team.run(lambda: partial.rename(directory) if team.is_first else None)
    if team.is_first:
        is_finished(directory)
    return made
