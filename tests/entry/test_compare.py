"""The launcher that compares, as a user runs it: interrupted, resumed, and refusing."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from opt_deus_jax.comparison.running import prepare
from opt_deus_jax.config import Contender, UpscaleConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.training.preemption import EXIT_STATUS
from tests.children import end
from tests.entry.launching import begin, fail, launch, succeed
from tests.entry.tiny_comparison import get_config
from tests.evaluation.questions import write_questions

# What depends on the clock.
_TIMED = ("step_seconds", "tokens_per_second")
# The progress of scoring.
_ASKING = "continuations: 100%"


@pytest.fixture(scope="module")
def arguments(base: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    questions = write_questions(tmp_path_factory.mktemp("questions") / "lmeval")
    return [
        "--config=tests/entry/tiny_comparison.py",
        f"--config.experiment.base={base}",
        f"--config.experiment.data.train={text}",
        f"--config.experiment.evaluation.local_data={questions}",
    ]


@pytest.fixture(scope="module")
def workdir(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After a comparison that was killed once."""
    directory = tmp_path_factory.mktemp("compare")
    outputs = (Path(os.devnull), Path(os.devnull))
    process = begin("compare", *arguments, f"--workdir={directory}", outputs=outputs)
    while not list(directory.glob("results/*.json")):
        assert process.is_alive()
        time.sleep(0.05)
    process.kill()
    process.join()
    made = {path: path.stat().st_mtime_ns for path in directory.glob("results/*.json")}
    assert 0 < len(made) < 6
    resumed = launch("compare", *arguments, f"--workdir={directory}")
    assert resumed.returncode == 0, resumed.stderr
    assert "copy_next" in resumed.stdout
    assert _ASKING in resumed.stderr
    assert all(path.stat().st_mtime_ns == since for path, since in made.items())
    return directory


def results(workdir: Path) -> dict[str, Any]:
    return {
        path.stem: {k: v for k, v in json.loads(path.read_text()).items() if k not in _TIMED}
        for path in (workdir / "results").glob("*.json")
    }


def test_every_contender_is_swept_and_trained_for_every_seed(workdir: Path):
    assert set(results(workdir)) == {
        f"{method}_{run}"
        for method in ("copy_next", "opt_deus")
        for run in ("sweep_0.0005", "seed0", "seed1")
    }


def test_killed_and_started_again_it_gives_the_results_of_an_uninterrupted_one(
    workdir: Path, arguments: list[str], tmp_path: Path
):
    succeed("compare", *arguments, f"--workdir={tmp_path}", "--only=copy_next")
    found = results(workdir)
    alone = results(tmp_path)
    assert len(alone) == 3
    assert alone == {name: found[name] for name in alone}


def test_sigterm_ends_it_with_one_line_and_the_step_saved(arguments: list[str], tmp_path: Path):
    flags = (*arguments, f"--workdir={tmp_path}", "--config.experiment.training.steps=500")
    errors = tmp_path / "stderr"
    stopped = begin("compare", *flags, outputs=(Path(os.devnull), errors))
    while not any(path.stat().st_size for path in tmp_path.glob("runs/*/metrics.jsonl")):
        assert stopped.is_alive()
        time.sleep(0.05)
    os.kill(stopped.pid, signal.SIGTERM)
    assert end([stopped], 600) == [EXIT_STATUS]
    said = errors.read_text()
    (step,) = re.findall(r"^SIGTERM: stopped after step (\d+), which is saved$", said, re.MULTILINE)
    assert "Traceback" not in said
    assert list(tmp_path.glob(f"runs/*/checkpoints/{step}"))


def test_processes_share_the_runs_and_take_over_those_of_one_that_is_killed(
    workdir: Path, arguments: list[str], tmp_path: Path
):
    shared = ("compare", *arguments, f"--workdir={tmp_path}")
    said = [tmp_path / str(number) for number in range(3)]
    outputs = [(path, Path(os.devnull)) for path in said]
    killed = begin(*shared, outputs=outputs[0])
    while not list(tmp_path.glob("runs/*/metrics.jsonl")):
        assert killed.is_alive()
        time.sleep(0.05)
    others = [begin(*shared, outputs=output) for output in outputs[1:]]
    while "learning rate" not in "".join(path.read_text() for path in said[1:] if path.exists()):
        assert all(process.is_alive() for process in others)
        time.sleep(0.05)
    killed.kill()
    killed.join()
    assert end(others, 600) == [0, 0]
    found = results(workdir)
    assert results(tmp_path) == found
    by_process = [
        re.findall(r"^([\w.]+): held-out loss", p.read_text(), re.MULTILINE) for p in said
    ]
    assert sorted(sum(by_process, [])) == sorted(found)


def test_tables_and_pictures_are_made_and_made_again_without_running(
    workdir: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
):
    report = workdir / "results" / "report"
    pictures = {path.name for path in report.glob("*.png")}
    assert {"loss_curves.png", "final_losses.png", "paired_differences.png"} <= pictures
    before = (report / "summary.md").read_text()
    assert "opt_deus" in before
    shutil.rmtree(report)
    # bash leaves a tilde behind `=` to the program.
    monkeypatch.setenv("HOME", str(workdir))
    folders = (f"--workdir={workdir}", "--results=~/results")
    succeed("compare", *arguments, *folders, "--report_only")
    assert (report / "summary.md").read_text() == before
    assert {path.name for path in report.glob("*.png")} == pictures


def test_a_result_says_how_it_came_about_and_names_no_folder(workdir: Path, base: Path):
    result = results(workdir)["opt_deus_seed1"]
    assert [point["step"] for point in result["held_out"]] == [0, 2, 4, 6, 8, 10]
    assert result["identity"]["bit_identical"]
    assert result["diagnostics"]
    assert result["accuracies"]["piqa"]["questions"] == 3
    assert result["word_perplexity"] > 1
    assert str(base.parent) not in json.dumps(result)
    assert result["command"].endswith("--only=opt_deus")


def test_contenders_of_a_seed_begin_alike_and_see_the_same_text(workdir: Path):
    found = results(workdir)
    starts = {
        found[f"{method}_seed{seed}"]["held_out"][0]["loss"]
        for method in ("copy_next", "opt_deus")
        for seed in (0, 1)
    }
    assert len(starts) == 1
    firsts = {
        seed: {found[f"{m}_seed{seed}"]["training_losses"][0][1] for m in ("copy_next", "opt_deus")}
        for seed in (0, 1)
    }
    assert [len(losses) for losses in firsts.values()] == [1, 1]
    assert firsts[0] != firsts[1]


def test_a_trained_model_is_left_and_can_be_trained_on(
    workdir: Path, arguments: list[str], tmp_path: Path
):
    assert [path.name for path in (workdir / "exported").iterdir()] == ["copy_next"]
    model = shutil.copytree(workdir / "exported" / "copy_next", tmp_path / "copy_next")
    config = f"--config=tests/entry/tiny_comparison.py:{model}"
    command = [config, *arguments[1:], f"--workdir={tmp_path}", "--config.seeds=(0,)"]
    succeed("compare", *command)
    found = results(tmp_path)
    assert set(found) == {"on_sweep_0.0005", "on_seed0"}
    assert found["on_seed0"]["upscale"] == {"method": "base", "base": "copy_next"}
    (start, *_, end) = (point["loss"] for point in found["on_seed0"]["held_out"])
    before = results(workdir)["copy_next_seed0"]["held_out"][-1]["loss"]
    assert start == pytest.approx(before, abs=1e-5)
    assert end < start
    # The model of another run under the same name is grown from anew.
    made_as = model / "comparison.json"
    made_as.write_text(made_as.read_text().replace("copy_next_seed0", "copy_next_seed7"))
    shutil.rmtree(tmp_path / "results")
    succeed("compare", *command)
    assert len(list((tmp_path / "expanded").iterdir())) == 2


def test_a_run_made_again_for_its_model_leaves_its_result(
    workdir: Path, arguments: list[str], tmp_path: Path
):
    path = tmp_path / "results" / "copy_next_seed0.json"
    shutil.copytree(workdir / "results", tmp_path / "results")
    # What another machine found.
    path.write_text(path.read_text().replace('"steps": 10,', '"steps": 10, '))
    before = path.read_text()
    command = ("compare", *arguments, f"--workdir={tmp_path}", "--only=copy_next")
    made = launch(*command)
    assert made.returncode == 0, made.stderr
    assert "the result that was there before stays" in made.stdout
    # Its answers stand in that result.
    assert _ASKING not in made.stderr
    assert path.read_text() == before
    made_as = json.loads((tmp_path / "exported" / "copy_next" / "comparison.json").read_text())
    assert made_as["upscale"] == {"method": "copy_next", "num_new_layers": 2}
    made_as["upscale"]["method"] = "copy_previous"
    (tmp_path / "exported" / "copy_next" / "comparison.json").write_text(json.dumps(made_as))
    assert "from a run that had upscale.method='copy_previous'" in fail(*command)


def test_a_base_with_another_tokenizer_is_refused(
    workdir: Path, arguments: list[str], tmp_path: Path
):
    model = tmp_path / "model"
    shutil.copytree(workdir / "exported" / "copy_next", model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3))
    config = f"--config=tests/entry/tiny_comparison.py:{model}"
    command = ("compare", config, *arguments[1:], f"--workdir={tmp_path / 'work'}")
    assert "tokenizer.json is not the one that the model was grown with" in fail(*command)
    # Where nothing is known of how it was grown, it is still to read what the others read.
    (model / "upscale_manifest.json").unlink()
    assert "its tokenizer.json is not that of" in fail(*command)


def test_another_recipe_and_an_unknown_contender_are_refused(workdir: Path, arguments: list[str]):
    where = f"--workdir={workdir}"
    change = "--config.experiment.optimizer.beta2=0.9"
    assert "recipe.optimizer.beta2=0.95" in fail("compare", *arguments, where, change)
    assert "copy_next, opt_deus" in fail("compare", *arguments, where, "--only=copy_nxt")


def test_missing_questions_are_found_before_anything_is_made(arguments: list[str], tmp_path: Path):
    (folder := tmp_path / "lmeval").mkdir()
    (work := tmp_path / "work").mkdir()
    missing = f"--config.experiment.evaluation.local_data={folder}"
    error = fail("compare", *arguments[:-1], missing, f"--workdir={work}")
    assert str(folder) in error
    assert not list(work.iterdir())


def test_a_contender_that_cannot_be_grown_is_found_before_others_are_trained(
    base: Path, text: Path, tmp_path: Path
):
    (work := tmp_path / "work").mkdir()
    comparison = get_config()
    comparison.experiment.base = str(base)
    comparison.questions = comparison.perplexity_pages = 0
    uneven = UpscaleConfig(method="copy_next", num_new_layers=3, layout="uniform")
    comparison.contenders += (Contender("uneven", uneven),)
    missing = Contender("on", UpscaleConfig(method="base"), base="no/such/model")
    comparison.contenders += (missing,)
    folders: Any = {"workdir": work, "results": work, "command": "", "say": print}
    with pytest.raises(UserError, match=r"contender uneven: .*num_new_layers=3"):
        prepare(comparison, ["copy_next", "uneven"], **folders)
    with pytest.raises(UserError, match=r"contender on: .*no/such/model.*--only=NAMES"):
        prepare(comparison, **folders)
    assert not list(work.iterdir())
    comparison.experiment.data.train = str(text)
    assert set(prepare(comparison, ["copy_next"], **folders).bases) == {""}


def test_a_config_of_one_experiment_is_refused(base: Path, tmp_path: Path):
    error = fail("compare", "--config=tests/entry/tiny_config.py", f"--workdir={tmp_path}")
    assert "Comparison" in error
