"""Time and peak memory of a command."""

import dataclasses
import os
import subprocess
import time
from collections.abc import Callable, Sequence

from opt_deus_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a command took.

    Attributes:
        seconds: Wall time, start-up included.
        peak_bytes: Largest resident size, as the kernel counts it (memory-mapped files included).
        was_killed: Whether it was ended on the way, as it was meant to be.
    """

    seconds: float
    peak_bytes: int
    was_killed: bool = False


def run_measured(command: Sequence[str], kill_when: Callable[[], bool] = lambda: False) -> Measured:
    """Runs a command to its end, or to the moment when it is to be killed.

    Args:
        command: Program and arguments.
        kill_when: Asked ten times a second; SIGKILL follows the first True.

    Returns:
        Its time and peak memory.

    Raises:
        UserError: It failed.
    """
    start = time.perf_counter()
    with subprocess.Popen(list(command)) as process:
        ended, killed = 0, False
        while not ended:
            ended, status, usage = os.wait4(process.pid, 0 if killed else os.WNOHANG)
            if ended:
                process.returncode = os.waitstatus_to_exitcode(status)
            elif kill_when():
                process.kill()
                killed = True
            else:
                time.sleep(0.1)
    if process.returncode and not killed:
        raise UserError(f"{' '.join(command)}: failed, see above")
    # Linux counts in KiB.
    return Measured(time.perf_counter() - start, usage.ru_maxrss * 1024, killed)
