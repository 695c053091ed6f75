"""Real processes over loopback, each of which runs a function as one of a program."""

import socket
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from opt_deus_jax.distributed.processes import start_processes


def join(address: str, count: int, index: int) -> None:
    """Joins this process with the others, as a launcher does."""
    together = [f"--coordinator={address}", f"--num_processes={count}", f"--process_id={index}"]
    flags.FLAGS(["program", *together[: 3 if count > 1 else 0]])
    start_processes()


def leave() -> None:
    """Waits for the others, as the interpreter does when a launcher ends; a fork does not."""
    jax.distributed.shutdown()


def start(children: Any, run: Callable[..., None], count: int, *arguments: object) -> list[Any]:
    """Starts so many processes of `run(*arguments, address, count, index)`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [
        children.Process(target=run, args=(*arguments, address, count, index))
        for index in range(count)
    ]
    for process in started:
        process.start()
    return started


def end(started: list[Any], seconds: float) -> list[int]:
    """Waits for all; their exit statuses."""
    deadline = time.monotonic() + seconds
    for process in started:
        process.join(deadline - time.monotonic())
        assert process.exitcode is not None, f"still running after {seconds} seconds"
    return [process.exitcode for process in started]
