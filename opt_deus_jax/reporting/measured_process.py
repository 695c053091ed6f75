"""Time and peak memory of a command."""

import dataclasses
import os
import subprocess
import time
from collections.abc import Sequence

from opt_deus_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a command took.

    Attributes:
        seconds: Wall time, start-up included.
        peak_bytes: Largest resident size, as the kernel counts it (memory-mapped files included).
    """

    seconds: float
    peak_bytes: int


def run_measured(command: Sequence[str]) -> Measured:
    """Runs a command to its end.

    Args:
        command: Program and arguments.

    Returns:
        Its time and peak memory.

    Raises:
        UserError: It failed.
    """
    start = time.perf_counter()
    with subprocess.Popen(list(command)) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{' '.join(command)}: failed, see above")
    # Linux counts in KiB.
    return Measured(time.perf_counter() - start, usage.ru_maxrss * 1024)
