"""Several real processes over loopback train as one does."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from opt_deus_jax.config import DataConfig, Experiment, MeshConfig, OptimizerConfig, TrainingConfig
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.training.loop import train
from opt_deus_jax.training.metrics import StepMonitor, read_metrics
from opt_deus_jax.training.preemption import EXIT_STATUS, Preempted
from opt_deus_jax.training.segments import select_trained
from tests.children import end, join, start
from tests.training.tiny import tiny_hf_config, tiny_records, tiny_source

STEPS, BATCH, RECORDS = 9, 8, 50
# As many devices in all, however many processes share them.
DEVICES = 4


def note_records(workdir: Path) -> None:
    """Has every step write down its records before it is reported."""
    observe = StepMonitor.observe

    def noting(monitor: StepMonitor, step: int, records: np.ndarray, metrics: Any) -> None:
        with (workdir / f"seen_{jax.process_index()}.jsonl").open("a") as file:
            file.write(json.dumps([step, records.tolist()]) + "\n")
        observe(monitor, step, records, metrics)

    StepMonitor.observe = noting  # pyright: ignore[reportAttributeAccessIssue]


def seen(workdir: Path, process: int) -> dict[int, list[int]]:
    """Records of each step, of all runs; a step that is made again sees the same ones."""
    records: dict[int, list[int]] = {}
    for line in (workdir / f"seen_{process}.jsonl").read_text().splitlines():
        step, numbers = json.loads(line)
        assert records.setdefault(step, numbers) == numbers
    return records


def train_here(workdir: Path, address: str, count: int, index: int) -> None:
    """What each process runs."""
    jax.config.update("jax_num_cpu_devices", DEVICES // count)
    join(address, count, index)
    note_records(workdir)
    names = select_trained(read_model_config(tiny_hf_config()), [False, False, True, True], "new")
    try:
        result = train(
            Experiment(
                data=DataConfig(seed=3),
                optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
                mesh=MeshConfig(data=2, fsdp=2),
                training=TrainingConfig(
                    steps=STEPS, batch_size=BATCH, evaluate_every=5, checkpoint_every=2
                ),
            ),
            tiny_source(zeroed=(2, 3)),
            trained=names,
            train_records=tiny_records(RECORDS),
            held_out_records=tiny_records(7, seed=1),
            workdir=workdir,
            fingerprints={},
            devices=jax.devices(),
        )
    except Preempted:
        sys.exit(EXIT_STATUS)
    if jax.process_index() == 0:
        summary = {"resumed_from": result.resumed_from, "held_out": result.held_out_losses}
        (workdir / "summary.json").write_text(json.dumps(summary))


def run(children: Any, workdir: Path, count: int) -> dict[str, Any]:
    """Trains with so many processes to the end; the summary that process 0 writes."""
    assert end(start(children, train_here, count, workdir), 300) == [0] * count
    return json.loads((workdir / "summary.json").read_text())


def wait_for_step(started: list[Any], workdir: Path, step: int) -> None:
    while max([0, *losses(workdir)]) < step:
        assert all(process.is_alive() for process in started)
        time.sleep(0.01)


def losses(workdir: Path) -> dict[int, float]:
    lines = read_metrics(workdir / "metrics.jsonl")
    return {int(line["step"]): line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def alone(children: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    workdir = tmp_path_factory.mktemp("alone")
    return workdir, run(children, workdir, 1)


def assert_same(workdir: Path, summary: dict[str, Any], alone: tuple[Path, Any]) -> None:
    expected_workdir, expected = alone
    actual, one = losses(workdir), losses(expected_workdir)
    assert list(actual) == list(one) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(actual.values()), list(one.values()), rtol=1e-5)
    np.testing.assert_allclose(summary["held_out"], expected["held_out"], rtol=1e-5)
    whole = seen(expected_workdir, 0)
    assert list(whole) == list(range(1, STEPS + 1))
    for process in range(len(list(workdir.glob("seen_*.jsonl")))):
        part = seen(workdir, process)
        assert part == {step: whole[step] for step in part}
    assert sorted(seen(workdir, 0)) == sorted(whole)


# Once the coordinator, once another process; taken up by more processes, and by one.
@pytest.mark.parametrize(("count", "killed", "resumed_by"), [(2, 0, 4), (4, 1, 1)])
def test_a_killed_process_ends_the_job_and_another_number_resumes_it(
    children: Any,
    alone: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    count: int,
    killed: int,
    resumed_by: int,
):
    started = start(children, train_here, count, tmp_path)
    # By then the checkpoint of step 4 is being written, and that of step 2 is whole.
    wait_for_step(started, tmp_path, 5)
    started[killed].kill()
    assert all(status != 0 for status in end(started, 60))
    summary = run(children, tmp_path, resumed_by)
    assert 2 <= summary["resumed_from"] < STEPS
    assert_same(tmp_path, summary, alone)


def test_sigterm_to_one_process_saves_and_stops_both(
    children: Any, alone: tuple[Path, dict[str, Any]], tmp_path: Path
):
    started = start(children, train_here, 2, tmp_path)
    wait_for_step(started, tmp_path, 3)
    started[1].terminate()
    statuses = end(started, 60)
    # The notice may come too late for the last step.
    assert statuses in ([EXIT_STATUS] * 2, [0] * 2)
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    summary = run(children, tmp_path, 2)
    assert summary["resumed_from"] == saved >= 3
    assert_same(tmp_path, summary, alone)
