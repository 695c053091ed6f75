"""The launcher that evaluates, as a user runs it."""

import json
import shutil
from pathlib import Path

import pytest

from tests.entry.launching import CONFIG, fail, succeed
from tests.evaluation.questions import write_questions


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions") / "lmeval")


def _arguments(base: Path, workdir: Path, questions: Path) -> tuple[str, ...]:
    return (
        *(f"--config={CONFIG}", f"--config.base={base}", f"--workdir={workdir}"),
        *("--config.evaluation.tasks=('piqa','wikitext')",),
        f"--config.evaluation.local_data={questions}",
    )


def test_results_are_lm_eval_s(base: Path, questions: Path, tmp_path: Path) -> None:
    arguments = _arguments(base, tmp_path, questions)
    shown = succeed("evaluate", *arguments, "--model=base", "--name=before", "--samples")
    assert "word_perplexity" in shown
    # The text of 150 words is longer than the context of 128.
    assert "fit the context: 0" in shown
    results = json.loads((tmp_path / "evaluation" / "before.json").read_text())
    assert results["results"]["piqa"].keys() >= {"acc,none", "acc_stderr,none", "acc_norm,none"}
    assert results["results"]["wikitext"]["word_perplexity,none"] > 1
    assert results["n-samples"]["piqa"] == {"original": 3, "effective": 3}
    lines = (tmp_path / "evaluation" / "before_samples_piqa.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["acc"] for line in lines) / 3 == pytest.approx(
        results["results"]["piqa"]["acc,none"]
    )


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
    error = fail("evaluate", *_arguments(base, tmp_path, questions), "--model=base")
    assert "opt_deus_jax[eval]" in error
