r"""Trains the new layers side by side with transformers and torch: tokens a second, peak memory.

python -m experiments.benchmark_train --config=configs/smollm2_135m.py --workdir=runs/speed
Both see the same weights, records and AdamW (at a constant rate) in float32, and take steps in
turn, each in a process of its own; the first step is warm-up. Needs the extra `test`. Makes
WORKDIR/expanded and records where they are missing; writes WORKDIR/benchmark_train.json.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

from absl import flags

from opt_deus_jax import launch
from opt_deus_jax.checkpoints.manifest import read_manifest
from opt_deus_jax.config import Experiment
from opt_deus_jax.data.records import first_batches, load_records
from opt_deus_jax.errors import UserError
from opt_deus_jax.reporting.machine import machine
from opt_deus_jax.reporting.tables import records_table, show
from opt_deus_jax.reporting.turns import compare, take_turns
from opt_deus_jax.whole_files import write_json

launch.define_flags()
_SHAPES = flags.DEFINE_list("shapes", ["4x256", "2x512"], "Batches: sequences x tokens.")
_STEPS = flags.DEFINE_integer("timed_steps", 6, "Timed steps of each.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 2, "Cores that each may use.", lower_bound=1)
_COMPILED = flags.DEFINE_bool("torch_compile", False, "Time torch.compile too.")
_CONSTANT_RATE = ("schedule=wsd", "warmup_steps=0", "decay_fraction=0.0")


def _commands(experiment: Experiment, workdir: Path, ours: list[str]) -> dict[str, list[str]]:
    is_new = read_manifest(workdir / "expanded").is_new
    options = {
        "model": str(workdir / "expanded"),
        "trained_layers": [layer for layer, new in enumerate(is_new) if new],
        "optimizer": dataclasses.asdict(experiment.optimizer),
        "threads": _THREADS.value,
    }
    commands = {"opt_deus_jax": [*ours, *(f"--config.optimizer.{s}" for s in _CONSTANT_RATE)]}
    for name in ("torch", "torch.compile")[: 1 + _COMPILED.value]:
        one = json.dumps(options | {"compile": name != "torch"})
        commands[name] = [sys.executable, "-m", "experiments.oracles.torch_train", one]
    return commands


def main() -> None:
    """Makes model and records, then lets the trainers take turns."""
    launch.need("test", "torch")
    experiment, workdir = launch.start(("base", "upscale", "data"))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: _THREADS.value])
    arguments = [a for a in sys.argv if a.startswith("--config")] + [f"--workdir={workdir}"]
    for launcher, folder in (("expand", "expanded"), ("prepare_data", "records")):
        if not (workdir / folder).exists():
            command = [sys.executable, "-m", f"experiments.{launcher}", *arguments]
            if subprocess.run(command, check=False).returncode:
                raise UserError(f"experiments.{launcher} failed, see above; mend it")
    ours = [sys.executable, "-m", "experiments.serve_steps", *arguments]
    commands = _commands(experiment, workdir, ours)
    text, result, batches = load_records(workdir / "records", "train").tokens, {}, {}
    for shape in _SHAPES.value:
        rows, length = map(int, shape.split("x"))
        batches[shape] = first_batches(text, rows, length, _STEPS.value + 1)
    for shape, given in batches.items():
        taken = take_turns(commands, given)
        table = compare(taken, math.prod(map(int, shape.split("x"))))
        result[shape] = {"programs": table, "steps": {k: v._asdict() for k, v in taken.items()}}
        show(records_table(table, f"{shape} tokens a step; ratios: of the first over each"))
    result |= {"command": sys.argv[1:], **machine("jax", "optax", "torch", "transformers")}
    write_json(workdir / "benchmark_train.json", result)


if __name__ == "__main__":
    launch.run(main)
