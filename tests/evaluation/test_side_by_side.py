"""How two models' answers are compared, and what of their time counts."""

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import LM

from opt_deus_jax.config import EvaluationConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.evaluation.lm_eval_model import OptDeusModel
from opt_deus_jax.evaluation.side_by_side import (
    ask,
    compare_answers,
    compare_tasks,
    finished_rows,
    refuse_generation,
    tables,
)
from opt_deus_jax.evaluation.tasks import load_tasks


def _results(*answers: tuple[float, ...], asked: str = "what") -> dict[str, Any]:
    rows = [
        {
            "doc_id": number,
            "arguments": (asked, number),
            "filtered_resps": [(log_likelihood, False) for log_likelihood in one],
        }
        for number, one in enumerate(answers)
    ]
    return {"samples": {"piqa": rows}}


def test_choices_differ_only_beyond_a_tie() -> None:
    ours = _results((-1.0, -2.0), (-3.0, -3.0004), (-5.0, -5.2), (-7.0, -7.5))
    theirs = _results((-1.0, -2.0), (-3.0009, -3.0), (-5.0011, -5.0), (-7.0, -7.4995))
    agreement = compare_answers(ours, theirs)
    assert agreement.largest_difference == pytest.approx(0.2)
    assert agreement.ties == 1
    assert agreement.disagreements == [
        {"task": "piqa", "question": 2, "ours": [-5.0, -5.2], "theirs": [-5.0011, -5.0]}
    ]


def test_of_a_text_to_be_predicted_it_counts_whether_it_is_the_likeliest() -> None:
    ours, theirs = _results((-1.0,), (-2.0,)), _results((-1.0,), (-2.0,))
    assert not compare_answers(ours, theirs).disagreements
    ours["samples"]["piqa"][1]["filtered_resps"] = [(-2.0, True)]
    agreement = compare_answers(ours, theirs)
    assert [found["question"] for found in agreement.disagreements] == [1]
    assert agreement.ties == 0


def test_other_questions_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different questions"):
        compare_answers(_results((-1.0, -2.0)), _results((-1.0, -2.0), asked="who"))
    with pytest.raises(ValueError, match="different tasks"):
        compare_answers(_results((-1.0, -2.0)), {"samples": {}})


class _Wrong(LM):
    """Takes one of two answers for the other."""

    def __init__(self, model: OptDeusModel) -> None:
        super().__init__()
        self.model = model

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        answers = self.model.loglikelihood(requests, disable_tqdm=True)
        return [answers[number ^ 1] for number in range(len(answers))]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        return [1.01 * answer for answer in self.model.loglikelihood_rolling(requests, True)]

    def generate_until(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError


def test_a_wrong_model_is_found_out(model: OptDeusModel, questions: Path) -> None:
    settings = EvaluationConfig(tasks=("piqa", "wikitext"), local_data=str(questions))
    rows = []
    for name, task in zip(settings.tasks, load_tasks(settings), strict=True):
        ours, theirs = (ask(one, settings, task) for one in (model, _Wrong(model)))
        assert ours.seconds > ours.compile_seconds >= 0
        rows.append(compare_tasks(name, ours, theirs))
    piqa, wikitext = rows
    assert (piqa["questions"], piqa["metric"], piqa["ties"]) == (3, "acc", 0)
    assert piqa["differing"] == len(piqa["disagreements"]) == 3
    for one in piqa["disagreements"]:
        assert one["ours"] == one["theirs"][::-1]
        assert abs(one["ours"][0] - one["ours"][1]) <= piqa["largest_difference"]
    # The right one of two is taken by one of two.
    assert piqa["ours"] + piqa["theirs"] == pytest.approx(1)
    assert (wikitext["questions"], wikitext["metric"]) == (2, "word_perplexity")
    ratio = wikitext["theirs"] / wikitext["ours"]
    assert wikitext["relative_difference"] == pytest.approx(1 - 1 / ratio)
    assert ratio > 1.001
    assert wikitext["metrics"]["byte_perplexity"]["ours"] > 1
    answers, seconds = tables(rows)
    assert [row["differ"] for row in answers] == [3, 0]
    assert [row["hf / ours"] for row in seconds] == [
        row["theirs_s"] / row["ours_s"] for row in rows
    ]


def test_tasks_that_generate_are_refused(questions: Path) -> None:
    task: Any
    (task,) = load_tasks(EvaluationConfig(tasks=("piqa",), local_data=str(questions)))
    refuse_generation([task])
    task.OUTPUT_TYPE = "generate_until"
    with pytest.raises(UserError, match="piqa generates text"):
        refuse_generation([task])


def test_an_interrupted_run_goes_on_only_with_the_same_command(tmp_path: Path) -> None:
    path, facts = tmp_path / "result.json", {"command": ["--limit=3"], "cores": 2}
    assert finished_rows(path, facts) == []
    path.write_text(json.dumps({**facts, "tasks": [{"task": "piqa"}]}))
    assert finished_rows(path, facts) == [{"task": "piqa"}]
    with pytest.raises(UserError, match="made with cores 2, not 1"):
        finished_rows(path, {**facts, "cores": 1})
