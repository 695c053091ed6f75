"""Reading lm_eval's results."""

from collections.abc import Mapping
from typing import Any


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
