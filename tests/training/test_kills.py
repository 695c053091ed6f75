"""Trainings that are killed or preempted on their way end bit for bit where they would have."""

import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opt_deus_jax.config import Experiment
from opt_deus_jax.training.loop import TrainingResult
from opt_deus_jax.training.metrics import read_metrics
from opt_deus_jax.training.preemption import EXIT_STATUS, Preempted
from opt_deus_jax.training.weights import parameter_hash
from tests.training.test_loop import SPEEDS, experiment, run, steps_of

KILLS = 20
STEPS = 80
# Kills come before this step, far from the end: no training gets there before its kill.
LAST_KILL = STEPS - 40
PATIENCE = 120


def settings(checkpoint_every: int = 1) -> Experiment:
    return experiment(steps=STEPS, checkpoint_every=checkpoint_every, evaluate_every=9)


def train_in_child(workdir: Path) -> None:
    """With a checkpoint at every step: something is being written at almost any moment."""
    try:
        run(workdir, settings())
    except Preempted:
        sys.exit(EXIT_STATUS)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingResult]:
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return workdir, run(workdir, settings(STEPS))


def wait_until(is_true: Callable[[], bool], process: Any, every: float = 0.02) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_true():
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(every)


def is_saving(workdir: Path) -> bool:
    return any("tmp" in path.name for path in (workdir / "checkpoints").glob("*"))


def last_step(workdir: Path) -> int:
    return int(max([0, *steps_of(workdir, "loss")]))


def kill_one(children: Any, workdir: Path, number: int, draw: random.Random) -> str:
    """Starts a training and kills it at some moment; says which."""
    process = children.Process(target=train_in_child, args=(workdir,))
    wanted = min(last_step(workdir) + draw.randint(1, 3), LAST_KILL)
    process.start()
    moment = ("starting", "stepping", "saving")[number % 3]
    if moment == "starting":
        time.sleep(draw.uniform(0, 2))
    else:
        wait_until(lambda: last_step(workdir) >= wanted, process)
        if moment == "saving":
            wait_until(lambda: is_saving(workdir), process, every=0.001)
        time.sleep(draw.uniform(0, 0.03))
    was_saving = is_saving(workdir)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return "saving" if was_saving else moment


def assert_ends_alike(workdir: Path, uninterrupted: tuple[Path, TrainingResult]) -> None:
    """Runs to the end what was stopped."""
    result, (other, expected) = run(workdir, settings(STEPS)), uninterrupted
    assert 0 < result.resumed_from < STEPS
    assert parameter_hash(result.state) == parameter_hash(expected.state)
    assert result.held_out_losses == expected.held_out_losses
    lines, expected_lines = (
        [
            {name: value for name, value in line.items() if name not in SPEEDS}
            for line in read_metrics(folder / "metrics.jsonl")
        ]
        for folder in (workdir, other)
    )
    assert lines == expected_lines
    assert not is_saving(workdir)
    assert not (workdir / "damaged_checkpoints").exists()


def test_twenty_kills_change_nothing(
    children: Any, tmp_path: Path, uninterrupted: tuple[Path, TrainingResult]
):
    draw = random.Random(0)
    moments = [kill_one(children, tmp_path, number, draw) for number in range(KILLS)]
    assert moments.count("saving") >= KILLS // 3
    assert_ends_alike(tmp_path, uninterrupted)


def test_sigterm_saves_at_once_and_changes_nothing(
    children: Any, tmp_path: Path, uninterrupted: tuple[Path, TrainingResult]
):
    process = children.Process(target=train_in_child, args=(tmp_path,))
    process.start()
    wait_until(lambda: last_step(tmp_path) >= 3, process)
    process.terminate()
    process.join()
    assert process.exitcode == EXIT_STATUS
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert last_step(tmp_path) == saved < STEPS
    assert_ends_alike(tmp_path, uninterrupted)
