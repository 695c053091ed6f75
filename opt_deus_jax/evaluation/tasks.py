"""lm_eval's tasks, from the hub or from local files."""

import difflib
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory

from opt_deus_jax.config import PAPER_TASKS, EvaluationConfig
from opt_deus_jax.data.sources import Source, read_rows
from opt_deus_jax.errors import UserError

# Where lm_eval keeps each task, and what its local files begin with (`_SPLIT.jsonl.gz` follows).
_STOCK: Mapping[str, tuple[str, str]] = {
    "arc_easy": ("arc", "arc_easy"),
    "logiqa": ("logiqa", "logiqa"),
    "winogrande": ("winogrande", "winogrande_xl"),
    "commonsense_qa": ("commonsense_qa", "commonsense_qa"),
    "boolq": ("super_glue/boolq", "boolq"),
    "piqa": ("piqa", "piqa"),
    "mmlu": ("mmlu/default", "mmlu"),
    "wikitext": ("wikitext", "wikitext2_raw_document_level"),
}
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_ENDINGS = (".jsonl.gz", ".jsonl")
# Draws of the metrics whose standard error has no closed form.
_BOOTSTRAPS = 1000


@functools.lru_cache(maxsize=16)
def _read(path: Path) -> list[dict[str, Any]]:
    return [row.fields for row in read_rows(Source(path, path.name))]


def _local_file(folder: Path, name: str, split: str) -> Path | None:
    paths = (folder / f"{name}_{split}{ending}" for ending in _ENDINGS)
    return next((path for path in paths if path.is_file()), None)


class LocalTask(ConfigurableTask):
    """A stock task whose questions are read from files; prompts and metrics are lm_eval's."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Leaves out the splits that have no file.

        Args:
            config: The stock configuration, with the folder as `dataset_kwargs["folder"]` and the
                beginning of the files' names as `dataset_kwargs["name"]`.

        Raises:
            UserError: The file of the scored split is missing.
        """
        config = {key: value for key, value in config.items() if key != "class"}
        folder, name = (config["dataset_kwargs"][key] for key in ("folder", "name"))
        scored = config.get("test_split") or config["validation_split"]
        if _local_file(Path(folder), name, scored) is None:
            raise UserError(
                f"config field evaluation.local_data={folder!r}: no {name}_{scored}.jsonl.gz, "
                f"which task {config['task']} needs; add it or leave the task out"
            )
        for key in _SPLITS:
            if config.get(key) and _local_file(Path(folder), name, config[key]) is None:
                config[key] = None
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Reads the splits; of a task with subjects only the rows of its own."""
        assert dataset_kwargs is not None
        folder, name = Path(dataset_kwargs["folder"]), dataset_kwargs["name"]
        self.dataset = {}
        for key in _SPLITS:
            split = getattr(self.config, key)
            path = _local_file(folder, name, split) if split else None
            if path is None:
                continue
            rows = _read(path)
            if rows and "subject" in rows[0]:
                rows = [row for row in rows if row["subject"] == self.config.dataset_name]
            if not rows:
                raise UserError(f"{path}: no question of task {self.config.task}; check the file")
            self.dataset[split] = datasets.Dataset.from_list(rows)


def load_tasks(settings: EvaluationConfig) -> list[Task | Group]:
    """Builds the tasks that a configuration names.

    Args:
        settings: Its `tasks`, `local_data`, `limit` and `num_fewshot`.

    Returns:
        A task or group for each name; of a tag all its tasks.

    Raises:
        UserError: A task is unknown, the hub or the folder does not have its questions, or a number
            is negative.
    """
    for field in ("limit", "num_fewshot"):
        if getattr(settings, field) < 0:
            raise UserError(
                f"config field evaluation.{field}={getattr(settings, field)}: use 0 or more"
            )
    if not settings.tasks:
        raise UserError(f"config field evaluation.tasks is empty; use {','.join(PAPER_TASKS)}")
    if not settings.local_data:
        return _from_hub(settings)
    for name in settings.tasks:
        if name not in _STOCK:
            raise _unknown(name, list(_STOCK), "; others need the hub")
    folder = Path(settings.local_data).expanduser()
    if not folder.is_dir():
        raise UserError(f"config field evaluation.local_data={settings.local_data!r}: no folder")
    tasks = [_from_folder(name, folder) for name in settings.tasks]
    if settings.num_fewshot:
        _check_examples(tasks, settings)
    return tasks


def _from_hub(settings: EvaluationConfig) -> list[Task | Group]:
    manager = TaskManager()
    for name in settings.tasks:
        if name not in manager.all_tasks:
            raise _unknown(
                name, manager.all_tasks, ", or any other of lm_eval (`lm_eval ls tasks`)"
            )
    try:
        loaded = manager.load(list(settings.tasks))
    except (OSError, ValueError) as error:
        raise UserError(
            f"config field evaluation.tasks={','.join(settings.tasks)}: the hub did not give "
            f"the questions ({error}); set evaluation.local_data=FOLDER where there is no hub"
        ) from None
    return _outermost(loaded)


def _from_folder(name: str, folder: Path) -> Any:
    stock, prefix = _STOCK[name]
    # lm_eval has thousands of tasks, which take seconds to list.
    path = Path(lm_eval.tasks.__file__).parent / stock
    index = TaskManager(include_path=path, include_defaults=False).task_index
    files = {"folder": str(folder), "name": prefix}
    # The overrides reach every task of a group.
    overrides = {"class": LocalTask, "dataset_kwargs": files}
    return TaskFactory().build(index[name], overrides=overrides, registry=index)


def _outermost(loaded: Any) -> list[Task | Group]:
    groups, inner = loaded.get("groups", {}), set()
    for group in groups.values():
        inner.update(group.child_names)
    everything = {**loaded["tasks"], **groups}
    return [item for name, item in everything.items() if name not in inner]


def _leaves(item: Task | Group) -> list[Any]:
    return item.get_all_tasks() if isinstance(item, Group) else [item]


def _check_examples(tasks: Sequence[Task | Group], settings: EvaluationConfig) -> None:
    for task in (leaf for item in tasks for leaf in _leaves(item)):
        if not (task.config.fewshot_split or task.config.training_split):
            raise UserError(
                f"config field evaluation.num_fewshot={settings.num_fewshot}: "
                f"{settings.local_data} has no file to draw examples of {task.task_name} from; "
                "add its training split or use 0"
            )


def _unknown(name: str, known: Sequence[str], others: str) -> UserError:
    close = difflib.get_close_matches(name, known, 3)
    meant = f" (did you mean {' or '.join(close)}?)" if close else ""
    return UserError(
        f"config field evaluation.tasks: unknown task {name!r}{meant}; use some of "
        f"{', '.join(PAPER_TASKS)}{others}"
    )


def name_of(item: Task | Group) -> str:
    """Name of a task or group."""
    return item.name if isinstance(item, Group) else item.task_name


def metric_names(item: Task | Group) -> list[str]:
    """What a task is marked by, or a group over all of its tasks: `acc` and so on."""
    if isinstance(item, Group):
        return [metric.metric for metric in item.aggregate_metric_list or ()]
    by_name: Any = item.aggregation()
    return list(by_name)


def output_types(item: Task | Group) -> set[str]:
    """What is asked of a model: `multiple_choice`, `loglikelihood_rolling` and so on."""
    return {leaf.OUTPUT_TYPE for leaf in _leaves(item)}


def is_rolling(item: Task | Group) -> bool:
    """Whether whole texts are scored, as wikitext's are, not answers to questions."""
    return output_types(item) == {"loglikelihood_rolling"}


def first_questions(tasks: Sequence[Task | Group], limit: int) -> dict[str, list[int]] | None:
    """Which questions to ask.

    Args:
        tasks: Tasks and groups.
        limit: Questions of each; a group spreads them evenly over its tasks, rounded up.

    Returns:
        By task, the numbers of its first questions; None for all of all.
    """
    if not limit:
        return None
    asked = {}
    for item in tasks:
        leaves = _leaves(item)
        for task in leaves:
            asked[task.task_name] = list(range(min(-(-limit // len(leaves)), len(task.eval_docs))))
    return asked


def run_tasks(
    model: LM,
    settings: EvaluationConfig,
    *,
    tasks: Sequence[Task | Group] | None = None,
    log_samples: bool = False,
) -> dict[str, Any]:
    """Evaluates a model.

    Args:
        model: Any model of lm_eval.
        settings: What to ask it.
        tasks: From `load_tasks`, where they are loaded already.
        log_samples: Whether to keep every question and answer.

    Returns:
        lm_eval's own results.

    Raises:
        UserError: As `load_tasks`, or the model cannot answer.
    """
    tasks = load_tasks(settings) if tasks is None else tasks
    # lm_eval would fork this process, in which JAX has threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    evaluate: Any = simple_evaluate
    results = evaluate(
        model=model,
        tasks=list(tasks),
        # It would read thousands of files to look up the tasks that are here already.
        task_manager=TaskManager(include_defaults=False),
        num_fewshot=settings.num_fewshot,
        samples=first_questions(tasks, settings.limit),
        bootstrap_iters=_BOOTSTRAPS,
        log_samples=log_samples,
    )
    results["config"]["limit"] = settings.limit or None
    return results
