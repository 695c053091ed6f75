"""Writing and reading lm_eval's results."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval.utils import handle_non_serializable

from opt_deus_jax.errors import UserError
from opt_deus_jax.whole_files import write_text


def write_results(folder: Path, name: str, results: Mapping[str, Any]) -> Path:
    """Writes NAME.json as lm_eval does and, where there are samples, NAME_samples_TASK.jsonl.

    Args:
        folder: Where to; made where it is missing.
        name: Of the files, which are overwritten.
        results: What `run_tasks` returns.

    Returns:
        The file with the results.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def dump(content: Any, indent: int | None = None) -> str:
        text = json.dumps(
            content, indent=indent, default=handle_non_serializable, ensure_ascii=False
        )
        return text + "\n"

    for task, rows in results.get("samples", {}).items():
        write_text(folder / f"{name}_samples_{task}.jsonl", "".join(map(dump, rows)))
    path = folder / f"{name}.json"
    write_text(path, dump({key: results[key] for key in results if key != "samples"}, 2))
    return path


def refuse_other_model(folder: Path, name: str, pretrained: str) -> None:
    """Refuses to put results in the place of those of another model.

    Args:
        folder: With the results.
        name: Of their files.
        pretrained: What is to be evaluated.

    Raises:
        UserError: NAME.json is there, and of something else.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        return
    theirs = json.loads(path.read_text())["config"].get("model_args")
    if theirs != {"pretrained": pretrained}:
        raise UserError(f"{path} is of {theirs}, not of {pretrained}; give another --name")


def metric_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each metric of each task that is not part of a group, and of each group.

    Args:
        results: What `run_tasks` returns.

    Returns:
        Rows of task, metric, value, standard error (`N/A` where lm_eval has none) and questions.
    """
    counts, parts = results["n-samples"], results.get("group_subtasks", {})
    inner = {name for names in parts.values() for name in names if name not in parts}
    rows = []
    for task, metrics in results["results"].items():
        if task in inner:
            continue
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            rows.append(
                {
                    "task": task,
                    "metric": metric if filtered == "none" else key,
                    "value": value,
                    "stderr": metrics.get(f"{metric}_stderr,{filtered}", "N/A"),
                    "questions": _questions(task, counts, parts),
                }
            )
    return rows


def _questions(name: str, counts: Mapping[str, Any], parts: Mapping[str, list[str]]) -> int:
    if name in counts:
        return counts[name]["effective"]
    return sum(_questions(part, counts, parts) for part in parts.get(name, ()))
