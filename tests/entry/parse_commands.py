"""Parses command lines as launchers would, and checks their configs, without running them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

from opt_deus_jax import launch
from opt_deus_jax.comparison.runs import check_comparison
from opt_deus_jax.config import Comparison, validate
from opt_deus_jax.upscaling.methods import resolve_method
from tests.entry import launching

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


def check_here(command: list[str], variables: dict[str, str], outputs: tuple[Path, Path]) -> None:
    """Stands for `run_here`, in a fork."""
    launch.run = check_instead
    launching.run_here(command, variables, outputs)


def problem_of(launcher: str, arguments: list[str]) -> str | None:
    """What a command line would be refused for."""
    result = launching.launch(launcher, *arguments, run=check_here)
    if result.returncode == 0:
        return None
    return result.stderr[-2000:] or f"status {result.returncode}"
