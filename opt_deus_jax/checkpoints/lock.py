"""What one process at a time writes to."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from opt_deus_jax.errors import UserError


def lock(file: IO, refusal: str) -> None:
    """Keeps every other process from an open file, until it is closed or this process ends.

    Some network file systems know no locks; there nothing is kept.

    Args:
        file: The file.
        refusal: What is said where another process has it.

    Raises:
        UserError: Another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(refusal) from None
    except OSError:
        return


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
