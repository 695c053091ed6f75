"""Which questions are asked, and what is said where they are missing."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from opt_deus_jax.config import EvaluationConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.evaluation.tasks import first_questions, load_tasks, metric_names


def _load(**settings: Any) -> Any:
    return load_tasks(EvaluationConfig(**settings))


def test_a_limit_is_spread_over_a_group(questions: Path) -> None:
    tasks = _load(tasks=("piqa", "mmlu"), local_data=str(questions))
    assert first_questions(tasks, 0) is None
    asked = first_questions(tasks, 2)
    assert asked is not None
    assert asked.pop("piqa") == [0, 1]
    assert len(asked) == 57
    assert set(map(tuple, asked.values())) == {(0,)}
    # There are three and two questions, not more.
    asked = first_questions(tasks, 1000)
    assert asked is not None
    assert (len(asked["piqa"]), len(asked["mmlu_anatomy"])) == (3, 2)


def test_metrics_are_those_of_the_results(questions: Path) -> None:
    tasks = _load(tasks=("piqa", "mmlu", "wikitext"), local_data=str(questions))
    piqa, mmlu, wikitext = map(metric_names, tasks)
    assert "acc" in piqa
    assert mmlu == ["acc"]
    assert "word_perplexity" in wikitext
    assert "acc" not in wikitext


def test_prompts_are_those_of_lm_eval(questions: Path) -> None:
    (task,) = _load(tasks=("arc_easy",), local_data=str(questions))
    with gzip.open(questions / "arc_easy_test.jsonl.gz", "rt") as file:
        row = json.loads(file.readline())
    assert task.doc_to_text(task.eval_docs[0]) == f"Question: {row['question']}\nAnswer:"
    assert task.doc_to_choice(task.eval_docs[0]) == row["choices"]["text"]
    (mmlu,) = _load(tasks=("mmlu",), local_data=str(questions))
    subjects = {leaf.task_name: set(leaf.eval_docs["subject"]) for leaf in mmlu.get_all_tasks()}
    assert subjects["mmlu_anatomy"] == {"anatomy"}
    assert len(subjects) == 57


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tasks": ("arc_esy",)}, ("arc_esy", "did you mean arc_easy", "winogrande")),
        ({"tasks": ("hellaswag",)}, ("hellaswag", "hub")),
        ({"tasks": ()}, ("evaluation.tasks", "empty")),
        ({"tasks": ("piqa",), "num_fewshot": 2}, ("num_fewshot", "training split")),
        ({"local_data": "/nowhere"}, ("evaluation.local_data", "/nowhere")),
        ({"limit": -1}, ("evaluation.limit=-1", "0 or more")),
        ({"num_fewshot": -1}, ("evaluation.num_fewshot=-1", "0 or more")),
    ],
)
def test_what_cannot_be_asked_is_named(
    questions: Path, settings: dict[str, Any], named: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as error:
        _load(**{"local_data": str(questions), **settings})
    assert all(name in str(error.value) for name in named), str(error.value)
    assert "\n" not in str(error.value)


def test_missing_questions_are_named(questions: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(questions, tmp_path / "part")
    (folder / "boolq_validation.jsonl.gz").unlink()
    with pytest.raises(UserError, match=r"no boolq_validation\.jsonl\.gz"):
        _load(tasks=("boolq",), local_data=str(folder))
    # A validation split never stands in for a missing test split.
    (folder / "arc_easy_test.jsonl.gz").rename(folder / "arc_easy_validation.jsonl.gz")
    with pytest.raises(UserError, match="no arc_easy_test"):
        _load(tasks=("arc_easy",), local_data=str(folder))
