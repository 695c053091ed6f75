"""Programs that take steps in turn, each in a process of its own."""

import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from opt_deus_jax.errors import UserError


class Taken(NamedTuple):
    """What one program did.

    Attributes:
        seconds: Wall time of each step.
        cpu_seconds: Processor time of each step, over all threads.
        losses: What each step returned.
        peak_bytes: Largest resident size of its process, start-up and compilation included.
    """

    seconds: list[float]
    cpu_seconds: list[float]
    losses: list[float]
    peak_bytes: int


def serve_turns(step: Callable[[Int[np.ndarray, "b l"]], float]) -> None:
    """Takes a step for every batch on the standard input, until it ends.

    Args:
        step: From tokens [B, T + 1] to a loss; returns when all work is done.
    """
    for line in sys.stdin:
        tokens_BL = np.asarray(json.loads(line), np.int32)
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = step(tokens_BL)
        taken = (time.perf_counter() - start, time.process_time() - cpu_start, loss)
        # Linux counts in KiB.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps([*taken, peak]), flush=True)


def take_turns(
    commands: Mapping[str, Sequence[str]], batches: Sequence[Int[np.ndarray, "b l"]]
) -> dict[str, Taken]:
    """Runs programs that call `serve_turns`; while one takes a step the others wait.

    Args:
        commands: Program and arguments of each, by name.
        batches: All see all of them, in order.

    Returns:
        By name, what each did.

    Raises:
        UserError: One ended early.
    """
    with contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(_started(c)) for name, c in commands.items()}
        rows: dict[str, list[Any]] = {name: [] for name in commands}
        for batch in batches:
            for name, process in running.items():
                rows[name].append(_take(process, name, batch))
    taken = {}
    for name, answers in rows.items():
        seconds, cpu_seconds, losses, peaks = map(list, zip(*answers, strict=True))
        taken[name] = Taken(seconds, cpu_seconds, losses, peaks[-1])
    return taken


@contextlib.contextmanager
def _started(command: Sequence[str]) -> Iterator[Any]:
    with subprocess.Popen(
        list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def _take(process: Any, name: str, batch: np.ndarray) -> list[float]:
    try:
        process.stdin.write(json.dumps(batch.tolist()) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        raise UserError(f"the training by {name} ended early, see above")
    return json.loads(answer)
