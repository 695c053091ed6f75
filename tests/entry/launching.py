"""Runs launchers as a user does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
CONFIG = "tests/entry/tiny_config.py"
_WORDS = "the grown model computes what its base computes and then it learns more from text"


def environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}


def _command(launcher: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"experiments.{launcher}", *map(str, arguments)]


def launch_together(
    launcher: str, count: int, *arguments: object
) -> list[subprocess.CompletedProcess[str]]:
    """Starts a launcher in each of several processes that are one program."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        together = (f"--coordinator=127.0.0.1:{free.getsockname()[1]}", f"--num_processes={count}")
    started = [
        subprocess.Popen(
            _command(launcher, *arguments, *together, f"--process_id={index}"),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    # What each writes is short, so that none waits for its pipe to be read.
    outputs = [process.communicate() for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(started, outputs, strict=True)
    ]


def launch(launcher: str, *arguments: object) -> subprocess.CompletedProcess[str]:
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


def fail(launcher: str, *arguments: object) -> str:
    """Runs a launcher that must end with one line of error, which is returned."""
    result = launch(launcher, *arguments)
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def sentence(seed: int, words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(_WORDS.split(), words))
