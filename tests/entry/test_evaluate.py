"""The launchers that evaluate, as a user runs them."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints.test_gguf import shapes, write_gguf
from tests.entry.launching import CONFIG, error_of, fail, launch_anew, sentence, succeed
from tests.evaluation.questions import write_questions


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_questions(tmp_path_factory.mktemp("questions") / "lmeval")
    # Longer than any context here.
    rows = ({"question": "what", "passage": sentence(i, 200), "label": i % 2} for i in range(3))
    with gzip.open(folder / "boolq_validation.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def _arguments(base: Path, workdir: Path, questions: Path) -> tuple[str, ...]:
    return (
        *(f"--config={CONFIG}", f"--config.base={base}", f"--workdir={workdir}"),
        *("--config.evaluation.tasks=('piqa','boolq','wikitext')",),
        f"--config.evaluation.local_data={questions}",
    )


def test_results_are_lm_eval_s(base: Path, questions: Path, tmp_path: Path) -> None:
    arguments = _arguments(base, tmp_path, questions)
    shown = succeed("evaluate", *arguments, "--model=base", "--name=before", "--samples")
    assert "word_perplexity" in shown
    # Both answers to the questions of boolq; texts of wikitext are read in windows.
    assert "fit the context: 6" in shown
    results = json.loads((tmp_path / "evaluation" / "before.json").read_text())
    assert results["results"]["piqa"].keys() >= {"acc,none", "acc_stderr,none", "acc_norm,none"}
    assert results["results"]["wikitext"]["word_perplexity,none"] > 1
    assert results["config"]["truncated_requests"] == 6
    assert results["n-samples"]["piqa"] == {"original": 3, "effective": 3}
    lines = (tmp_path / "evaluation" / "before_samples_piqa.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["acc"] for line in lines) / 3 == pytest.approx(
        results["results"]["piqa"]["acc,none"]
    )


def test_results_of_another_model_are_not_overwritten(
    base: Path, questions: Path, tmp_path: Path
) -> None:
    first, second = (shutil.copytree(base, tmp_path / name / "model-1.5") for name in "ab")
    arguments = [*_arguments(base, tmp_path, questions), "--config.evaluation.tasks=('piqa',)"]
    succeed("evaluate", *arguments, f"--model={first}")
    written = tmp_path / "evaluation" / "model-1.5.json"
    before = written.read_text()
    assert json.loads(before)["config"]["model_args"] == {"pretrained": str(first)}
    assert "give another --name" in fail("evaluate", *arguments, f"--model={second}")
    assert written.read_text() == before


def test_the_base_of_another_experiment_is_refused(
    base: Path, questions: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"base": "grown/from/this"}))
    (tmp_path / "expanded").mkdir()
    error = fail("evaluate", *_arguments(base, tmp_path, questions), "--model=base")
    assert f"config field base='{base}'" in error
    assert "grown/from/this" in error


def test_a_model_that_is_not_there_says_what_to_run(
    base: Path, questions: Path, tmp_path: Path
) -> None:
    assert "experiments.export" in fail("evaluate", *_arguments(base, tmp_path, questions))


def test_the_tokenizer_of_another_model_is_refused(
    base: Path, questions: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["foreign"] = 999
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    error = fail("evaluate", *_arguments(base, tmp_path, questions), f"--model={other}")
    assert "tokenizer" in error
    assert "304" in error


def test_without_lm_eval_the_extra_is_named(
    base: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").write_text("raise ImportError('not installed')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = launch_anew("evaluate", *_arguments(base, tmp_path, questions), "--model=base")
    assert "opt_deus_jax[eval]" in error_of(result)


def test_the_hf_backend_agrees_and_both_are_timed(questions: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    tensors = {
        name: (0.1 * draw.standard_normal(shape) + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes().items()
    }
    write_gguf(tmp_path / "base.gguf", tensors=tensors)
    workdir = tmp_path / "run"
    shown = succeed(
        "benchmark_evaluate",
        *_arguments(tmp_path / "base.gguf", workdir, questions),
        *("--threads=1", "--texts=1", "--hf_batch_size=2"),
    )
    assert "Seconds of scoring" in shown
    assert (workdir / "base" / "expanded" / "tokenizer.json").exists()
    result = json.loads((workdir / "benchmark_evaluate.json").read_text())
    assert result["cores"] == 1
    rows = {row["task"]: row for row in result["tasks"]}
    assert {name: row["questions"] for name, row in rows.items()} == {
        **{"piqa": 3, "boolq": 3, "wikitext": 1}
    }
    assert [row["hf_batch_size"] for row in rows.values()] == [2, 2, 1]
    for row in rows.values():
        assert row["relative_difference"] < 1e-4
        assert 0 < row["largest_difference"] < 1e-3
        assert row["disagreements"] == []
        assert row["ours_s"] > row["compile_s"] >= 0
        assert row["speed_ratio"] == pytest.approx(row["theirs_s"] / row["ours_s"])
    assert rows["piqa"]["metrics"].keys() == {"acc", "acc_norm"}
    assert rows["wikitext"]["ours"] > 1
