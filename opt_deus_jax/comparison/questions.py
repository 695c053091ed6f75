"""What a comparison asks its trained models."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from opt_deus_jax.config import Comparison, EvaluationConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.evaluation.loading import LoadedModel

_PAGES = "wikitext"


class Questions(NamedTuple):
    """Tasks with what to ask of them.

    Attributes:
        settings: How many questions, and how a model answers them.
        tasks: From `load_tasks`; empty asks nothing.
    """

    settings: EvaluationConfig
    tasks: list[Any]


def load_questions(comparison: Comparison) -> dict[str, Questions]:
    """Reads all questions, which may be missing, before anything is trained.

    Args:
        comparison: The comparison, checked.

    Returns:
        "questions", whose accuracy counts, and "pages", whose perplexity does.

    Raises:
        UserError: A task is unknown or has no accuracy, or the hub or the folder does not have its
            questions.
    """
    given = comparison.experiment.evaluation
    choices = tuple(task for task in given.tasks if task != _PAGES)
    wanted = {
        "questions": (choices, comparison.questions),
        "pages": ((_PAGES,), comparison.perplexity_pages),
    }
    loaded = {}
    for name, (tasks, limit) in wanted.items():
        settings = dataclasses.replace(given, tasks=tasks, limit=limit)
        loaded[name] = Questions(settings, _load(settings) if tasks and limit else [])
    return loaded


def _load(settings: EvaluationConfig) -> list[Any]:
    # Slow to import, and only needed where something is asked.
    from opt_deus_jax.evaluation.tasks import load_tasks, metric_names, name_of

    # It remarks on defaults of its own tasks.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = load_tasks(settings)
    marked = [name_of(task) for task in tasks if "acc" in metric_names(task)]
    for name in settings.tasks:
        if name not in (*marked, _PAGES):
            raise UserError(
                f"config field evaluation.tasks: {name!r} has no accuracy of its own; give "
                "tasks or groups of lm_eval that have `acc`, those of a tag one by one"
            )
    return tasks


def ask(model: LoadedModel | None, questions: Mapping[str, Questions]) -> dict[str, Any]:
    """Accuracies and word perplexity of a model; lm_eval is needed only where something is asked.

    Args:
        model: The model; None of a training that diverged, which is asked nothing.
        questions: From `load_questions`.

    Returns:
        "accuracies" by task and "word_perplexity", None where no page is read.

    Raises:
        UserError: The model cannot answer.
    """
    if model is None or not any(tasks for _, tasks in questions.values()):
        return {"accuracies": {}, "word_perplexity": None}
    from opt_deus_jax.evaluation.lm_eval_model import OptDeusModel
    from opt_deus_jax.evaluation.tasks import run_tasks

    results: dict[str, Any] = {}
    for name, (settings, tasks) in questions.items():
        answering = OptDeusModel(model, settings.compute_dtype, settings.batch_tokens)
        results[name] = run_tasks(answering, settings, tasks=tasks) if tasks else None
    answers, pages = results["questions"], results["pages"]
    named = questions["questions"].settings.tasks if answers else ()
    return {
        "accuracies": {task: _accuracy(answers, task) for task in named},
        "word_perplexity": pages["results"][_PAGES]["word_perplexity,none"] if pages else None,
    }


def _accuracy(answers: Mapping[str, Any], task: str) -> dict[str, Any]:
    accuracy = answers["results"][task]["acc,none"]
    members = [task]
    while groups := [name for name in members if answers["group_subtasks"].get(name)]:
        members.remove(groups[0])
        members += answers["group_subtasks"][groups[0]]
    asked = sum(answers["n-samples"][name]["effective"] for name in members)
    # lm_eval gives a group none where a task of it was asked once.
    error = math.sqrt(accuracy * (1 - accuracy) / (asked - 1)) if asked > 1 else None
    return {"acc": accuracy, "acc_stderr": error, "questions": asked}
