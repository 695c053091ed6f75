"""Real processes over loopback, each of which runs a function as one of a program."""

import atexit
import functools
import gc
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import jax
import pytest
from absl import flags

from opt_deus_jax.distributed.processes import start_processes

_PRELOADED = (
    "tests.training.test_kills",
    "tests.training.test_processes",
    "tests.upscaling.expanding_process",
    # What launchers import; their own modules define flags, which each run must do itself.
    "opt_deus_jax.comparison.report",
    "opt_deus_jax.comparison.schedule",
    "opt_deus_jax.evaluation.lm_eval_model",
    # Imports torch.
    "tensorboardX",
)

# JAX's traces are millions of objects; collecting after every 700 new ones costs a sixth of a test.
gc.set_threshold(50_000)
# What is imported stays.
os.register_at_fork(after_in_child=gc.freeze)


@functools.cache
def forks() -> Any:
    """Starts processes as forks of one that has imported JAX but not used it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    compiled = tempfile.mkdtemp(prefix="compiled")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    # Forks have the environment in which their server was started; no other test may see it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("JAX_NUM_CPU_DEVICES", str(len(jax.devices())))
        patch.setenv("JAX_CPU_COLLECTIVES_IMPLEMENTATION", "gloo")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", compiled)
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        forkserver.ensure_running()
    return context


def flags_of_one(address: str, count: int, index: int) -> list[str]:
    """What makes a launcher one of so many processes."""
    return [f"--coordinator={address}", f"--num_processes={count}", f"--process_id={index}"]


def join(address: str, count: int, index: int) -> None:
    """Joins this process with the others, as a launcher does."""
    flags.FLAGS(["program", *(flags_of_one(address, count, index) if count > 1 else ())])
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
