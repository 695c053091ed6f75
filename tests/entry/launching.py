"""Runs launchers as a user does, most of them in forks that have imported what they need."""

import atexit
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests.children import end, flags_of_one, forks, start

ROOT = Path(__file__).parents[2]
CONFIG = "tests/entry/tiny_config.py"
# Seconds; the longest takes a minute, on two slow cores.
_PATIENCE = 600
_WORDS = "the grown model computes what its base computes and then it learns more from text"


def environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}


def _command(launcher: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"experiments.{launcher}", *map(str, arguments)]


def run_here(command: list[str], variables: dict[str, str], outputs: tuple[Path, Path]) -> None:
    """Does in a fork what `python -m experiments.LAUNCHER` does in a new process."""
    for stream, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(variables)
    jax.config.update("jax_num_cpu_devices", -1)
    _, _, module, *arguments = command
    sys.argv = ["", *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


def begin(
    launcher: str,
    *arguments: object,
    outputs: tuple[Path, Path],
    run: Callable[..., None] = run_here,
) -> Any:
    """Starts a launcher in a fork, which writes its stdout and stderr into two files."""
    command = _command(launcher, *arguments)
    process = forks().Process(target=run, args=(command, environment(), outputs))
    process.start()
    return process


def _outputs(folder: str, index: int = 0) -> tuple[Path, Path]:
    return Path(folder) / f"stdout{index}", Path(folder) / f"stderr{index}"


def _end_all(started: list[Any], folder: str) -> list[subprocess.CompletedProcess[str]]:
    statuses = end(started, _PATIENCE)
    return [
        subprocess.CompletedProcess("", status, *(o.read_text() for o in _outputs(folder, index)))
        for index, status in enumerate(statuses)
    ]


def _run_one(
    command: list[str],
    of_first: tuple[str, ...],
    variables: dict[str, str],
    folder: str,
    address: str,
    count: int,
    index: int,
) -> None:
    own = [*flags_of_one(address, count, index), *(of_first if index == 0 else ())]
    run_here([*command, *own], variables, _outputs(folder, index))


def launch_together(
    launcher: str, count: int, *arguments: object, of_first: tuple[str, ...] = ()
) -> list[subprocess.CompletedProcess[str]]:
    """Starts a launcher in each of several processes that are one program."""
    command = _command(launcher, *arguments)
    with tempfile.TemporaryDirectory() as folder:
        started = start(forks(), _run_one, count, command, of_first, environment(), folder)
        return _end_all(started, folder)


def launch(
    launcher: str, *arguments: object, run: Callable[..., None] = run_here
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        process = begin(launcher, *arguments, outputs=_outputs(folder), run=run)
        return _end_all([process], folder)[0]


def launch_anew(launcher: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process that imports everything itself."""
    return subprocess.run(
        _command(launcher, *arguments),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def succeed(launcher: str, *arguments: object) -> str:
    result = launch(launcher, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def error_of(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of error with which a launcher ended."""
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def fail(launcher: str, *arguments: object) -> str:
    """Runs a launcher that must end with one line of error, which is returned."""
    return error_of(launch(launcher, *arguments))


def sentence(seed: int, words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(_WORDS.split(), words))
