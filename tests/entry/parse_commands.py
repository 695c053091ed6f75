"""Parses command lines as launchers would, and checks their configs, without running them.

Reads a JSON list of [launcher, arguments] on stdin; writes a JSON list of errors, null where fine.
"""

import json
import os
import runpy
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags

import opt_deus_jax.comparison.running  # noqa: F401  Imported once, before the forks.
from opt_deus_jax import launch
from opt_deus_jax.comparison.runs import check_comparison
from opt_deus_jax.config import Comparison, validate
from opt_deus_jax.upscaling.methods import resolve_method

ELIDED = "..."


def check_instead(main: Callable[[], None]) -> None:
    """Stands for `launch.run`."""
    arguments = sys.argv[1:]
    if any(ELIDED in argument for argument in arguments):
        for argument in arguments:
            name = argument.removeprefix("--").split("=")[0].split(".")[0].removeprefix("no")
            if argument.startswith("--") and name not in flags.FLAGS:
                sys.exit(f"unknown flag {argument}")
        return

    def check(remaining: list[str]) -> None:
        if len(remaining) > 1:
            sys.exit(f"unexpected argument {remaining[1]}")
        config: Any = flags.FLAGS.config if "config" in flags.FLAGS else None
        if isinstance(config, Comparison):
            check_comparison(config)
        elif config is not None:
            validate(config)
            if config.upscale.num_new_layers or config.upscale.method == "base":
                resolve_method(config.upscale)

    app.run(check)


def problem_of(launcher: str, arguments: list[str]) -> str | None:
    """What a command line would be refused for, found in a process of its own."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.dup2(writer, 2)
        sys.argv = [f"experiments/{launcher}.py", *arguments]
        launch.run = check_instead
        try:
            runpy.run_module(f"experiments.{launcher}", run_name="__main__")
        except SystemExit as end:
            # Exits at once: taking all modules down takes longer than the rest.
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr, flush=True)
            os._exit(end.code if isinstance(end.code, int) else bool(end.code))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stderr:
        said = stderr.read()
    _, status = os.waitpid(child, 0)
    return said[-2000:] or f"status {status}" if status else None


if __name__ == "__main__":
    # The first line of output is the answer: what launchers print goes elsewhere.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    json.dump([problem_of(*command) for command in json.load(sys.stdin)], answer)
