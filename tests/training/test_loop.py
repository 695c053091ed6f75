import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from opt_deus_jax.checkpoints.lock import held_alone
from opt_deus_jax.checkpoints.saved_step import find_step
from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.config import DataConfig, Experiment, OptimizerConfig, TrainingConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.training import loop, program
from opt_deus_jax.training.export import trained_tensors
from opt_deus_jax.training.metrics import read_metrics
from opt_deus_jax.training.segments import plan_segments, select_trained
from opt_deus_jax.training.weights import parameter_hash
from tests.training.stacking import tensors_of
from tests.training.tiny import source_of, tiny_hf_config, tiny_records, tiny_source, tiny_tensors

MODEL = read_model_config(tiny_hf_config())
TRAINED = select_trained(MODEL, [False, False, True, True], "new")
# On a CPU, whose peak and memory are not known.
SPEEDS = {
    "step_seconds",
    "tokens_per_second",
    "tokens_per_second_per_device",
    "model_flops_per_second",
}
ROOT = Path(__file__).parents[2]
STEPS = 24


def experiment(seed: int = 3, **training: Any) -> Experiment:
    settings: dict[str, Any] = {
        "steps": STEPS,
        "batch_size": 4,
        "evaluate_every": 10,
        "checkpoint_every": 4,
    }
    return Experiment(
        data=DataConfig(seed=seed),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        training=TrainingConfig(**(settings | training)),
    )


def run(
    workdir: Path,
    settings: Experiment | None = None,
    source: CheckpointSource | None = None,
    **changes: Any,
) -> loop.TrainingResult:
    arguments: dict[str, Any] = {
        "trained": TRAINED,
        "train_records": tiny_records(50),
        "held_out_records": tiny_records(7, seed=1),
        "workdir": workdir,
        "fingerprints": {"model": "a", "records": "b"},
        "devices": jax.devices()[:1],
    }
    source = source or tiny_source(zeroed=(2, 3))
    return loop.train(settings or experiment(), source, **(arguments | changes))


def steps_of(workdir: Path, name: str) -> list[float]:
    return [line["step"] for line in read_metrics(workdir / "metrics.jsonl") if name in line]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, loop.TrainingResult]:
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return workdir, run(workdir)


def test_a_run_leaves_losses_metrics_and_checkpoints(
    uninterrupted: tuple[Path, loop.TrainingResult],
):
    workdir, result = uninterrupted
    assert (result.resumed_from, result.last_step) == (0, STEPS)
    assert [step for step, _ in result.held_out_losses] == [0, 10, 20, 24]
    assert steps_of(workdir, "held_out_loss") == [0, 10, 20, 24]
    assert steps_of(workdir, "loss") == list(range(1, STEPS + 1))
    line = read_metrics(workdir / "metrics.jsonl")[1]
    norms = {f"layer_{kind}_norm/{layer}" for kind in ("grad", "parameter") for layer in (2, 3)}
    assert set(line) == {"step", "loss", "grad_norm", "learning_rate"} | SPEEDS | norms
    assert all(line[name] > 0 for name in norms)
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [20, 24]
    assert list((workdir / "tensorboard").iterdir())
    # Only the two trained layers are saved: two moments and one master each.
    saved = sum(file.stat().st_size for file in (workdir / "checkpoints" / "24").rglob("*"))
    trained_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(result.state.trainable))
    assert saved < 3 * trained_bytes + 100_000

    last = find_step(workdir / "checkpoints", "latest")
    assert last.step == STEPS
    names, read = trained_tensors(last, MODEL, TRAINED)
    trained = tensors_of(result.state.trainable, MODEL, plan_segments(TRAINED.blocks))
    assert set(names) == trained.keys()
    for name in names:
        np.testing.assert_array_equal(read(name), trained[name])
    assert last.metadata["settings"]["fingerprint of the model"] == "a"
    losses = last.metadata["held_out_losses"]
    assert [tuple(pair) for pair in losses] == list(result.held_out_losses)


def test_a_finished_run_says_so(
    uninterrupted: tuple[Path, loop.TrainingResult], capfd: pytest.CaptureFixture[str]
):
    workdir, result = uninterrupted
    before = (workdir / "metrics.jsonl").read_bytes()
    again = run(workdir)
    assert "training is already finished, all 24 steps are made" in capfd.readouterr().out
    assert again.resumed_from == again.last_step == STEPS
    assert again.held_out_losses == result.held_out_losses
    assert parameter_hash(again.state) == parameter_hash(result.state)
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (experiment(seed=4), {}, r"24: this checkpoint was trained with data.seed=3, now it is 4"),
        (experiment(steps=30), {}, "training.steps=24, now it is 30; set it back or use another"),
        (None, {"fingerprints": {"model": "c", "records": "b"}}, "the model='a', now it is 'c'"),
        (None, {"fingerprints": {"model": "a", "records": "d"}}, "the records='b', now it is 'd'"),
        (
            None,
            {"trained": select_trained(MODEL, [True, True, False, False], "new")},
            "trained layers='FFTT'",
        ),
        (
            None,
            {"trained": select_trained(MODEL, [False] * 4, r"layers\.[23]\.mlp")},
            "trained parameters='down_kernel gate_kernel input_norm",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    uninterrupted: tuple[Path, loop.TrainingResult],
    settings: Experiment | None,
    changes: dict[str, Any],
    message: str,
):
    with pytest.raises(UserError, match=message):
        run(uninterrupted[0], settings, **changes)


def kill_at(workdir: Path, step: int) -> None:
    """Runs this file as a program and kills it when it has reported `step`."""
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(len(jax.devices())),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "tests.training.test_loop", str(workdir)]
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        while process.poll() is None and max([0, *steps_of(workdir, "loss")]) < step:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_a_killed_run_ends_bit_for_bit_where_it_would_have(
    uninterrupted: tuple[Path, loop.TrainingResult], tmp_path: Path
):
    kill_at(tmp_path, 11)
    # What a kill in the middle of a save or of a line leaves behind.
    (tmp_path / "checkpoints" / "12.orbax-checkpoint-tmp").mkdir(exist_ok=True)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    result = run(tmp_path)
    workdir, expected = uninterrupted
    # The save of step 8 may not have ended; that of step 4 had, before the next began.
    assert 4 <= result.resumed_from < STEPS
    assert parameter_hash(result.state) == parameter_hash(expected.state)
    assert result.held_out_losses == expected.held_out_losses
    without_speed = [
        [
            {name: value for name, value in line.items() if name not in SPEEDS}
            for line in read_metrics(folder / "metrics.jsonl")
        ]
        for folder in (workdir, tmp_path)
    ]
    assert without_speed[0] == without_speed[1]
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


def test_a_second_training_in_the_same_folder_is_refused(tmp_path: Path):
    with held_alone(tmp_path), pytest.raises(UserError) as error:
        run(tmp_path, experiment(steps=2))
    assert f"{tmp_path}: process {os.getpid()} is training here" in str(error.value)
    assert run(tmp_path, experiment(steps=2)).last_step == 2


def test_a_resumed_run_compiles_its_step_once(
    uninterrupted: tuple[Path, loop.TrainingResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    made = []
    make = program.make_train_step

    def remember(*arguments: Any) -> Any:
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(program, "make_train_step", remember)
    run(tmp_path, experiment(steps=3, checkpoint_every=2))
    assert made[-1]._cache_size() == 1
    for file in sorted((tmp_path / "checkpoints" / "3").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    (tmp_path / "checkpoints" / "3").rmdir()
    # How often something is reported, saved or evaluated may change on the way.
    changed = experiment(steps=3, checkpoint_every=1, log_every=2, evaluate_every=1)
    assert run(tmp_path, changed).resumed_from == 2
    assert made[-1]._cache_size() == 1


def test_a_loss_that_is_not_finite_stops(tmp_path: Path):
    hf_config = tiny_hf_config()
    tensors = tiny_tensors(hf_config, zeroed=(2, 3))
    # Token 63 breaks the network; one record of the training text has it.
    tensors["model.embed_tokens.weight"][63] = np.inf
    tensors["lm_head.weight"] = np.ones((64, 32), np.float32)
    hf_config["tie_word_embeddings"] = False
    records = tiny_records(50)
    clean = dataclasses.replace(records, tokens=np.minimum(records.tokens, 62))
    clean.tokens[30 * 8 + 3] = 63
    with pytest.raises(UserError) as error:
        run(
            tmp_path,
            experiment(checkpoint_every=1, evaluate_every=0, steps=13, keep_checkpoints=20),
            source_of(hf_config, tensors),
            train_records=clean,
            held_out_records=dataclasses.replace(clean, tokens=clean.tokens[:41]),
        )
    message = str(error.value)
    assert message.startswith("training stopped: loss is nan at step ")
    step = int(message.split(" at step ")[1].split(",")[0])
    assert 30 in json.loads(message.split(" on records ")[1].split(";")[0])
    assert f"last good checkpoint: {f'step {step - 1}' if step > 1 else 'there is none'}" in message
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert max([0, *saved]) == step - 1
    assert steps_of(tmp_path, "loss") == list(range(1, step))


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"steps": 0}, "training.steps=0"),
        ({"keep_checkpoints": 0}, "training.keep_checkpoints=0"),
        ({"evaluate_every": -1}, "training.evaluate_every=-1"),
        ({"accumulation_steps": 3}, "training.accumulation_steps=3: it must divide"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path: Path, training: dict[str, int], message: str):
    with pytest.raises(UserError, match=message):
        run(tmp_path, experiment(**training))


if __name__ == "__main__":
    run(Path(sys.argv[1]))
