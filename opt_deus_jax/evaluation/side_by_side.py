"""Two models of lm_eval asked the same: how long each takes, and how far their answers agree."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.api.task import Task

from opt_deus_jax.config import EvaluationConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.evaluation.results import metric_rows
from opt_deus_jax.evaluation.tasks import name_of, output_types, run_tasks

# Log-likelihoods, in nats, so close that the order of float32 sums may decide which is higher.
TIE = 1e-3
# The columns of two tables, by heading.
_ANSWERS = {
    **{"task": "task", "n": "questions", "metric": "metric", "ours": "ours", "hf": "theirs"},
    **{"relative": "relative_difference", "nats": "largest_difference", "ties": "ties"},
    "differ": "differing",
}
_SECONDS = {
    **{"task": "task", "ours": "ours_s", "compiling": "compile_s", "hf": "theirs_s"},
    **{"hf / ours": "speed_ratio", "of CPU time": "cpu_ratio"},
}
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Asked(NamedTuple):
    """What a model answered, and how long it took.

    Attributes:
        results: lm_eval's results, with every question and answer.
        seconds: Wall time of the answers: tokenising, compilation and scoring, but neither the
            loading of the model nor lm_eval's own work.
        cpu_seconds: Processor time of the same, over all threads.
        compile_seconds: How much of `seconds` XLA compiled.
    """

    results: dict[str, Any]
    seconds: float
    cpu_seconds: float
    compile_seconds: float


class _TimedModel(LM):
    def __init__(self, model: LM) -> None:
        super().__init__()
        self.model = model
        self.seconds = self.cpu_seconds = 0.0

    def _timed(self, answer: Callable[[list[Any]], Any], requests: list[Any]) -> Any:
        start, cpu_start = time.perf_counter(), time.process_time()
        answers = answer(requests)
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - cpu_start
        return answers

    def loglikelihood(self, requests: list[Any]) -> Any:
        return self._timed(self.model.loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any]) -> Any:
        return self._timed(self.model.loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any]) -> Any:
        return self._timed(self.model.generate_until, requests)


@contextlib.contextmanager
def _compilations() -> Iterator[list[float]]:
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED:
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def refuse_generation(tasks: Sequence[Task | Group]) -> None:
    """Refuses tasks whose answers are texts, which two models need not share.

    Args:
        tasks: From `load_tasks`.

    Raises:
        UserError: A task has no log-likelihoods.
    """
    for item in tasks:
        if "generate_until" in output_types(item):
            raise UserError(
                f"config field evaluation.tasks: {name_of(item)} generates text; only "
                "log-likelihoods are compared, leave it out"
            )


def ask(model: LM, settings: EvaluationConfig, task: Task | Group) -> Asked:
    """Asks a model the questions of one task or group.

    Args:
        model: Any model of lm_eval.
        settings: How many questions, after how many solved examples.
        task: From `load_tasks`.
    """
    timed = _TimedModel(model)
    with _compilations() as compilations:
        results = run_tasks(timed, settings, tasks=[task], log_samples=True)
    return Asked(results, timed.seconds, timed.cpu_seconds, sum(compilations))


class Agreement(NamedTuple):
    """How far two models agree on a task.

    Attributes:
        largest_difference: Of any log-likelihood of an answer or of a whole text, in nats.
        ties: Questions of which they choose different answers, ours within `TIE` of their best by
            their own log-likelihoods.
        disagreements: The other questions of which they choose different answers: `task`,
            `question` (its number) and the log-likelihoods of all answers by both.
    """

    largest_difference: float
    ties: int
    disagreements: list[dict[str, Any]]


def compare_answers(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Agreement:
    """Holds the answers of a model against those of another.

    Args:
        ours: What `run_tasks` returns with `log_samples`.
        theirs: The same of the other model.

    Raises:
        ValueError: They were not asked the same.
    """
    largest, ties, disagreements = 0.0, 0, []
    if ours["samples"].keys() != theirs["samples"].keys():
        raise ValueError("the models were asked different tasks")
    for task, rows in ours["samples"].items():
        for mine, other in zip(rows, theirs["samples"][task], strict=True):
            if mine["arguments"] != other["arguments"]:
                raise ValueError(f"{task}: the models were asked different questions")
            first, second = (_log_likelihoods(row) for row in (mine, other))
            largest = max(largest, float(np.max(np.abs(first - second))))
            chosen = int(np.argmax(first))
            if _choice(mine) == _choice(other):
                continue
            if len(second) > 1 and np.max(second) - second[chosen] <= TIE:
                ties += 1
                continue
            answers = {"ours": first.tolist(), "theirs": second.tolist()}
            disagreements.append({"task": task, "question": mine["doc_id"], **answers})
    return Agreement(largest, ties, disagreements)


def _log_likelihoods(sample: Mapping[str, Any]) -> np.ndarray:
    """Of the answers of a question, or of the one text of `loglikelihood_rolling`."""
    responses = sample["filtered_resps"]
    return np.array([one[0] if isinstance(one, tuple | list) else one for one in responses])


def _choice(sample: Mapping[str, Any]) -> int:
    """Which answer is the likeliest; of a text to be predicted alone, whether it is."""
    responses = sample["filtered_resps"]
    if len(responses) == 1 and isinstance(responses[0], tuple | list):
        return int(responses[0][1])
    return int(np.argmax(_log_likelihoods(sample)))


def _relative_difference(ours: float, theirs: float) -> float:
    return 0.0 if ours == theirs else abs(ours - theirs) / max(abs(ours), abs(theirs))


def compare_tasks(name: str, ours: Asked, theirs: Asked) -> dict[str, Any]:
    """Describes the answers and the time of a model next to those of another.

    Args:
        name: Of the task or group.
        ours: What `ask` returns.
        theirs: The same of the other model.

    Returns:
        `metrics` (all of them, by both) and `disagreements` in full; for a table `task`,
        `questions`, `metric` (the first), its values and their `relative_difference`,
        `largest_difference`, `ties`, `differing` (the number of disagreements), the seconds of
        both, how much of ours XLA compiled, `speed_ratio` (their seconds over ours) and
        `cpu_ratio` (the same of processor time).
    """
    rows = [
        [row for row in metric_rows(one.results) if row["task"] == name] for one in (ours, theirs)
    ]
    metrics = {
        mine["metric"]: {"ours": mine["value"], "theirs": other["value"]}
        for mine, other in zip(*rows, strict=True)
    }
    first, value = next(iter(metrics.items()))
    agreement = compare_answers(ours.results, theirs.results)
    return {
        "task": name,
        "questions": rows[0][0]["questions"],
        "metric": first,
        **value,
        "relative_difference": _relative_difference(**value),
        "largest_difference": agreement.largest_difference,
        "ties": agreement.ties,
        "differing": len(agreement.disagreements),
        "ours_s": ours.seconds,
        "theirs_s": theirs.seconds,
        "ours_cpu_s": ours.cpu_seconds,
        "theirs_cpu_s": theirs.cpu_seconds,
        "compile_s": ours.compile_seconds,
        "speed_ratio": theirs.seconds / ours.seconds,
        "cpu_ratio": theirs.cpu_seconds / ours.cpu_seconds,
        "metrics": metrics,
        "disagreements": agreement.disagreements,
    }


def finished_rows(path: Path, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tasks that an interrupted run was done with.

    Args:
        path: The file that it wrote: `facts`, and its rows as `tasks`.
        facts: The command, the machine and the versions of the present run.

    Returns:
        Its rows; none where there is no file.

    Raises:
        UserError: Its facts were others, so its times cannot stand beside those to come.
    """
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    rows = content.pop("tasks")
    if content != facts:
        differing = next(key for key in {**content, **facts} if content.get(key) != facts.get(key))
        raise UserError(
            f"{path}: made with {differing} {content.get(differing)}, not {facts.get(differing)}; "
            "use another --workdir"
        )
    return rows


def tables(rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the screen shows of rows of `compare_tasks`: the answers, and the seconds."""

    def select(columns: Mapping[str, str]) -> list[dict[str, Any]]:
        return [{heading: row[key] for heading, key in columns.items()} for row in rows]

    return select(_ANSWERS), select(_SECONDS)
