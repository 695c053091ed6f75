"""A folder that one process at a time writes to."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from opt_deus_jax.errors import UserError


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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{directory}: process {file.read().strip() or '?'} is training here; wait for it, "
                "end it, or use another --workdir"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
