"""What a comparison makes of runs that go wrong, and of models that others left."""

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest

from opt_deus_jax.checkpoints.lock import claimed
from opt_deus_jax.comparison.finished import read_runs
from opt_deus_jax.comparison.report import write_report
from opt_deus_jax.comparison.running import claim_of, prepare
from opt_deus_jax.comparison.runs import check_comparison
from opt_deus_jax.comparison.schedule import run_all
from opt_deus_jax.comparison.summary import contender_rows, finals_by_contender, sweep_rows
from opt_deus_jax.config import Comparison, Contender, UpscaleConfig
from opt_deus_jax.errors import UserError
from tests.entry import tiny_config

_UPSCALE = UpscaleConfig(method="copy_next", num_new_layers=1, trained="all")


def _comparison(base: Path, text: Path, **fields: Any) -> Comparison:
    shared = tiny_config.get_config()
    shared.base, shared.data.train = str(base), str(text)
    shared.training.steps, shared.training.batch_size = 5, 8
    settings = {"seeds": (0,), "max_rate_steps": 0, "exported": ("a",)} | fields
    return Comparison(shared, (Contender("a", _UPSCALE),), references=("a",), **settings)


def _run(comparison: Comparison, workdir: Path, results: str) -> list[dict[str, Any]]:
    check_comparison(comparison)
    folder = workdir / results
    return run_all(prepare(comparison, workdir=workdir, results=folder, command="", say=print))


# At the highest rates here scores of all layers overflow.
def test_a_rate_at_which_training_diverges_is_the_worst_of_those_tried(
    base: Path, text: Path, tmp_path: Path
) -> None:
    comparison = _comparison(base, text, max_rate_steps=1, rate_factor=1e30, sweep_fraction=1.0)
    results = _run(comparison, tmp_path, "results")
    ends = {run["learning_rate"]: run["held_out"][-1]["loss"] for run in results[:3]}
    start = comparison.experiment.optimizer.learning_rate
    assert math.isnan(ends.pop(max(ends)))
    assert all(map(math.isfinite, ends.values()))
    assert results[3]["kind"] == "final"
    assert results[3]["learning_rate"] <= start
    (row,) = sweep_rows(read_runs(tmp_path / "results"))
    assert row["used"] == row["chosen"] == results[3]["learning_rate"]
    # What is finished is not run again, however it ended.
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()}
    _run(comparison, tmp_path, "results")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()} == made


def test_a_run_of_another_process_is_waited_for_and_taken_over(
    base: Path, text: Path, tmp_path: Path
) -> None:
    comparison = _comparison(base, text, exported=(), seeds=(0, 1))
    said = []
    with contextlib.ExitStack() as other:
        for name in ("a_sweep_0.0005", "a_seed0"):
            assert other.enter_context(claimed(claim_of(tmp_path, name)))

        def say(line: str) -> None:
            said.append(line)
            if line.startswith("waiting for"):
                other.close()

        setting = prepare(
            comparison, workdir=tmp_path, results=tmp_path / "results", command="", say=say
        )
        made = [(run["kind"], run["seed"]) for run in run_all(setting)]
    assert made == [("sweep", comparison.sweep_seed), ("final", 0), ("final", 1)]
    # Nothing else can be begun before the sweep has ended.
    assert [line for line in said if "waiting" in line] == [
        "waiting for other processes: a_sweep_0.0005"
    ]


def test_a_training_that_diverges_is_a_result_and_leaves_no_model(
    base: Path, text: Path, tmp_path: Path
) -> None:
    comparison = _comparison(base, text)
    comparison.experiment.optimizer.learning_rate = 1e30
    _run(comparison, tmp_path, "results")
    assert not (tmp_path / "exported").exists()
    runs = read_runs(tmp_path / "results")
    (final,) = finals_by_contender(runs)["a"]
    assert [point["step"] for point in final.held_out] == [0, 1, 5]
    (row,) = contender_rows(runs)
    assert math.isnan(row["loss_100"])
    assert write_report(tmp_path / "results", tmp_path / "report", ("a",), None)


def test_the_exported_model_of_another_recipe_is_refused(
    base: Path, text: Path, tmp_path: Path
) -> None:
    _run(_comparison(base, text), tmp_path, "results")
    weights = tmp_path / "exported" / "a" / "model.safetensors"
    before = weights.read_bytes()
    other = _comparison(base, text)
    other.experiment.optimizer.beta2 = 0.5
    with pytest.raises(UserError, match=r"recipe\.optimizer\.beta2=0\.95, now it is 0\.5"):
        _run(other, tmp_path, "others")
    assert not (tmp_path / "others").exists()
    # An export that was killed before its end is made again.
    (weights.parent / "comparison.json").unlink()
    weights.write_bytes(b"")
    _run(_comparison(base, text), tmp_path, "results")
    assert weights.read_bytes() == before
