"""Reads the results that the authors of OpT-DeUS publish with their code."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opt_deus_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PublishedResult:
    """One evaluation of theirs.

    Attributes:
        regime: `CPT`, or `SFT` after it.
        size: Of the grown model.
        method: As they name it.
        step: Optimizer step.
        accuracies: By task.
        word_perplexity: Of wikitext.
    """

    regime: str
    size: str
    method: str
    step: int
    accuracies: Mapping[str, float]
    word_perplexity: float

    @property
    def mean_accuracy(self) -> float:
        """Over tasks, as their tables have it."""
        return sum(self.accuracies.values()) / len(self.accuracies)


def read_published(path: Path) -> list[PublishedResult]:
    """Reads a list of lm_eval's results.

    Args:
        path: Their `official_results.json`.

    Returns:
        Results in their order.

    Raises:
        UserError: It cannot be read, or a field is missing.
    """
    try:
        entries = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot read published results ({error})") from None
    if not isinstance(entries, list):
        raise UserError(f"{path}: published results must be a list of evaluations")
    results = []
    for number, entry in enumerate(entries):
        try:
            tasks = entry["results"]
            accuracies = {name: task["acc"] for name, task in tasks.items() if name != "wikitext"}
            names = ("regime", "size", "method", "step")
            perplexity = tasks["wikitext"]["word_perplexity"]
            results.append(
                PublishedResult(
                    **{name: entry[name] for name in names},
                    accuracies=accuracies,
                    word_perplexity=perplexity,
                )
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: evaluation {number} of the published results lacks {error}; get the "
                "authors' file again"
            ) from None
        if not accuracies:
            raise UserError(f"{path}: evaluation {number} has no accuracy")
    return results


def published_curves(
    results: list[PublishedResult], regime: str = "CPT", size: str = "1.72B"
) -> dict[str, list[PublishedResult]]:
    """Evaluations by method in the order of steps; the best last perplexity first.

    Args:
        results: From `read_published`.
        regime: The one to take.
        size: The one to take.

    Returns:
        By method.

    Raises:
        UserError: There is none.
    """
    curves: dict[str, list[PublishedResult]] = {}
    for result in sorted(results, key=lambda result: result.step):
        if (result.regime, result.size) == (regime, size):
            curves.setdefault(result.method, []).append(result)
    if not curves:
        raise UserError(f"published results: none of regime {regime} and size {size}")
    return dict(sorted(curves.items(), key=lambda item: item[1][-1].word_perplexity))


def published_name(method: Mapping[str, Any]) -> str | None:
    """The name that the authors give to a method; None for one that they have not tried.

    Of the transports they have tried `reference`.

    Args:
        method: Layout, weights, zero_init, trained and transport.

    Returns:
        As in their results for one size.
    """
    if method["weights"] == "transport" and method["transport"] != "reference":
        return None
    kind = (method["layout"], method["weights"], method["zero_init"])
    names = {
        ("top", "transport", True): "OpT-DeUS",
        ("top", "average", False): "Avg-DeUS",
        ("top", "predicted", False): "LESA",
        ("uniform", "copy_previous", True): "Llama-Pro",
        ("stack", "", False): "SOLAR",
        ("top", "", False): "Base",
    }
    return names.get(kind)
