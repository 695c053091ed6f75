"""What came of programs that took steps in turn."""

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opt_deus_jax.reporting.turns import Taken

# The first step compiles or warms up.
_FIRST_TIMED = 1


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


def machine(*packages: str) -> dict[str, Any]:
    """The processor, the cores that this process may use, and versions of packages."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else ())
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }
