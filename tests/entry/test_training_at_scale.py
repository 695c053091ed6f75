"""Fine-tuning, meshes and several processes through the launchers."""

import json
import shutil
from pathlib import Path

import pytest

from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.training.metrics import read_metrics
from tests.entry.launching import fail, launch, launch_together, sentence, succeed


@pytest.fixture(scope="module")
def copied(workdir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory before training."""
    directory = tmp_path_factory.mktemp("scale") / "run"
    directory.mkdir()
    for name in ("expanded", "records"):
        shutil.copytree(workdir / name, directory / name)
    return directory


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("mesh.tensor=2", r"mesh (data 1 x fsdp -1 x tensor 2) does not match the 1 devices"),
        ("training.batch_size=5000", "training.batch_size=5000: there are only"),
        ("training.attention=splash", "training.attention='splash': needs a TPU"),
    ],
)
def test_training_refuses_before_the_first_step(
    flags: list[str], copied: Path, argument: str, message: str
) -> None:
    assert message in fail("train", *flags[:-1], f"--workdir={copied}", f"--config.{argument}")
    assert not (copied / "metrics.jsonl").exists()


def test_a_missing_shard_is_named(flags: list[str], copied: Path, tmp_path: Path) -> None:
    shutil.copytree(copied, tmp_path / "run")
    weights = tmp_path / "run/expanded/model.safetensors"
    weights.unlink()
    assert "model.safetensors" in fail("train", *flags[:-1], f"--workdir={tmp_path / 'run'}")


def test_other_records_are_refused(flags: list[str], workdir: Path, tmp_path: Path) -> None:
    shutil.copytree(workdir, tmp_path / "run")
    path = tmp_path / "run/records/train.bin"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    assert "train.bin: its sha256" in fail("train", *flags[:-1], f"--workdir={tmp_path / 'run'}")


def test_a_checkpoint_of_another_model_is_refused(
    flags: list[str], workdir: Path, tmp_path: Path
) -> None:
    shutil.copytree(workdir, tmp_path / "run")
    path = tmp_path / "run/expanded/upscale_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["base"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    error = fail("train", *flags[:-1], f"--workdir={tmp_path / 'run'}")
    assert "fingerprint of the grown model" in error


def test_two_processes_train_what_one_does(
    flags: list[str], copied: Path, workdir: Path, tmp_path: Path
) -> None:
    shutil.copytree(copied, tmp_path / "run")
    arguments = (*flags[:-1], f"--workdir={tmp_path / 'run'}")
    results = launch_together("train", 2, *arguments, of_first=("--profile=3",))
    errors = "\n".join(result.stderr for result in results)
    assert [result.returncode for result in results] == [0, 0], errors
    alone, together = (
        [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
        for folder in (workdir, tmp_path / "run")
    )
    assert together == pytest.approx(alone, rel=1e-5)
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))
    assert (tmp_path / "run/loss.png").exists()


def test_processes_that_cannot_be_joined_are_refused(flags: list[str]) -> None:
    assert "--num_processes" in fail("train", *flags, "--coordinator=127.0.0.1:1")


def test_export_takes_the_checkpoint_that_is_named(
    flags: list[str], workdir: Path, tmp_path: Path
) -> None:
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/exported")
    here = [*flags[:-1], f"--workdir={tmp_path / 'run'}"]
    assert "4" in fail("export", *here, "--checkpoint=5")
    assert "step 4" in succeed("export", *here, "--checkpoint=4")


def test_a_grown_model_is_fine_tuned_on_instructions(
    flags: list[str], workdir: Path, tmp_path: Path
) -> None:
    rows = [
        {"instruction": sentence(i, 4), "input": "", "output": sentence(i, 8)} for i in range(80)
    ]
    (tmp_path / "instructions.json").write_text(json.dumps(rows))
    settings = {
        "base": workdir / "exported",
        "upscale.method": "base",
        "upscale.num_new_layers": 0,
        "upscale.trained": "new",
        "data.train": tmp_path / "instructions.json",
        "data.format": "alpaca",
        "data.template": "alpaca",
        "data.sequence_length": 256,
        "optimizer.learning_rate": 0.01,
        "training.steps": 0,
        "training.epochs": 2,
    }
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    arguments = [flags[0], f"--workdir={tmp_path / 'tuned'}", *overrides]
    succeed("expand", *arguments)
    assert "answer" in succeed("prepare_data", *arguments)
    succeed("train", *arguments)
    held_out = [
        line["held_out_loss"]
        for line in read_metrics(tmp_path / "tuned/metrics.jsonl")
        if "held_out_loss" in line
    ]
    assert held_out[-1] < held_out[0] - 0.1
    succeed("export", *arguments)
    before, after = (
        open_checkpoint(str(folder / "exported")) for folder in (workdir, tmp_path / "tuned")
    )
    moved = {n for n in before.tensors if (before.read(n) != after.read(n)).any()}
    manifest = json.loads((workdir / "exported/upscale_manifest.json").read_text())
    new = [layer["depth"] for layer in manifest["layers"] if layer["is_new"]]
    assert {int(name.split(".")[2]) for name in moved} == set(new)


def test_help_of_train_lists_the_flags_of_processes() -> None:
    shown = launch("train", "--help").stdout
    for flag in ("--coordinator", "--num_processes", "--process_id", "--profile"):
        assert flag in shown
