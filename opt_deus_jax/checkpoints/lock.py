"""What one process at a time writes to."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from opt_deus_jax.errors import UserError


def _take(file: IO, how: int) -> bool:
    try:
        fcntl.flock(file, how)
    except OSError as error:
        # Of a file system that knows no locks comes another one.
        return not isinstance(error, BlockingIOError)
    return True


def lock(file: IO, refusal: str) -> None:
    """Keeps every other process from an open file, until it is closed or this process ends.

    Some network file systems know no locks; there nothing is kept.

    Args:
        file: The file.
        refusal: What is said where another process has it.

    Raises:
        UserError: Another process has it.
    """
    if not _take(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
        raise UserError(refusal)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Claims what a file stands for, until the end of the block or of this process.

    Args:
        path: The file, made where it does not exist; it stays.

    Yields:
        False where another process has it. True on a file system that knows no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        yield _take(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def in_turn(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Claims what a file stands for, and waits for it where another process has it.

    Args:
        path: The file, made where it does not exist; it stays.
        say: Told of a wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        if not _take(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            say(f"{path.name}: another process makes it; waiting")
            _take(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def held_alone(directory: Path) -> Iterator[None]:
    """Holds a folder; the system lets go of it when this process ends, however it ends.

    Args:
        directory: The folder, made where it does not exist; gets a file `.lock`.

    Raises:
        UserError: Another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("a+") as file:
        file.seek(0)
        holder = file.read().strip() or "?"
        lock(
            file,
            f"{directory}: process {holder} is training here; wait for it, end it, or use another "
            "--workdir",
        )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
