"""Programs that take steps in turn, each in a process of its own."""

import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from opt_deus_jax.errors import UserError

# The first step compiles or warms up.
_FIRST_TIMED = 1


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


def compare(taken: Mapping[str, Taken], tokens_per_step: int) -> list[dict[str, Any]]:
    """Describes each program next to the first.

    Args:
        taken: By name, what each did; two steps at least. The first program is what the others are
            held against.
        tokens_per_step: Tokens a step.

    Returns:
        For each program: `tokens_per_second` and `step_seconds` (of the median step, warm-up left
        out), `cpu_seconds` (processor time of the median step), `peak_gib`, `speed_ratio` (tokens a
        second of the first over its own), `memory_ratio` (peak of the first over its own),
        `loss_error` (largest relative difference of a loss from the first's).
    """
    first = next(iter(taken.values()))

    def median(values: list[float]) -> float:
        return statistics.median(values[_FIRST_TIMED:])

    return [
        {
            "program": name,
            "tokens_per_second": tokens_per_step / median(one.seconds),
            "step_seconds": median(one.seconds),
            "cpu_seconds": median(one.cpu_seconds),
            "peak_gib": one.peak_bytes / 2**30,
            "speed_ratio": median(one.seconds) / median(first.seconds),
            "memory_ratio": first.peak_bytes / one.peak_bytes,
            "loss_error": max(
                abs(theirs - ours) / abs(ours)
                for theirs, ours in zip(one.losses, first.losses, strict=True)
            ),
        }
        for name, one in taken.items()
    ]
