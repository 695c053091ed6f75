"""The rows of a summary as people read them: tables of text, for the screen and in Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Shown = tuple[str, list[dict[str, str]]]
NOTHING = "-"


def shown_tables(summary: Mapping[str, Sequence[Row]]) -> list[Shown]:
    """Titles and rows of text; tables without rows are left out.

    Args:
        summary: From `summarize`.

    Returns:
        Tables in the order of reading.
    """
    references = dict.fromkeys(row["reference"] for row in summary["paired"])
    tables = [
        ("Held-out loss by share of the tokens (nats a token)", _losses(summary["contenders"])),
        ("Answers and speed", _answers(summary["contenders"])),
        *(
            (
                f"Differences to {reference}, over seeds that both have",
                [_difference(row) for row in summary["paired"] if row["reference"] == reference],
            )
            for reference in references
        ),
        ("Held-out loss of the trials by learning rate", _sweeps(summary["sweeps"])),
        ("Step time and FLOPs over those of the same weights at the top", _steps(summary["steps"])),
        ("Diagnostics (means over matrices) and final loss", _diagnostics(summary["diagnostics"])),
    ]
    return [(title, rows) for title, rows in tables if rows]


def markdown(tables: Sequence[Shown]) -> str:
    """Tables as GitHub renders them; all columns but the first are aligned right."""
    parts = []
    for title, rows in tables:
        lines = [list(rows[0]), ["---"] + ["---:"] * (len(rows[0]) - 1)]
        lines += [list(row.values()) for row in rows]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(f"## {title}\n\n{text}\n")
    return "\n".join(parts)


def _number(value: float | None, digits: int, *, scale: float = 1.0, sign: bool = False) -> str:
    if value is None:
        return NOTHING
    return f"{scale * value:{'+' if sign else ''}.{digits}f}"


def _rate(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"


def _losses(rows: Sequence[Row]) -> list[dict[str, str]]:
    shares = [key for key in rows[0] if key.startswith("loss_") and key[5:].isdigit()]
    return [
        {
            "contender": row["contender"],
            "layout": row["layout"],
            "rate": _rate(row["learning_rate"]),
            "seeds": str(row["seeds"]),
            **{f"{share[5:]} %": _number(row[share], 4) for share in shares},
            "± seeds": _number(row["loss_stderr"], 4),
        }
        for row in rows
    ]


def _answers(rows: Sequence[Row]) -> list[dict[str, str]]:
    return [
        {
            "contender": row["contender"],
            "accuracy, %": _number(row["accuracy"], 2, scale=100),
            "± seeds": _number(row["accuracy_stderr"], 2, scale=100),
            "± questions": _number(row["accuracy_binomial"], 2, scale=100),
            "word perplexity": _number(row["word_perplexity"], 3),
            "± its seeds": _number(row["word_perplexity_stderr"], 3),
            "step, s": _number(row["step_seconds"], 3),
            "tokens/s": _number(row["tokens_per_second"], 0),
        }
        for row in rows
    ]


def _difference(row: Row) -> dict[str, str]:
    shown = {"contender": row["contender"], "pairs": str(row["loss_pairs"])}
    columns = (
        ("loss", "loss", 4, 1.0),
        ("accuracy", "accuracy, points", 2, 100.0),
        ("word_perplexity", "word perplexity", 3, 1.0),
    )
    for metric, title, digits, scale in columns:
        value = _number(row[f"{metric}_difference"], digits, scale=scale, sign=True)
        error = _number(row[f"{metric}_stderr"], digits, scale=scale)
        shown[title] = value if value == NOTHING else f"{value} ± {error}"
        shown[f"t, {metric.removeprefix('word_')}"] = _number(row[f"{metric}_t"], 1, sign=True)
    return shown | {"p, loss": NOTHING if row["loss_p"] is None else f"{row['loss_p']:.2g}"}


def _sweeps(rows: Sequence[Row]) -> list[dict[str, str]]:
    rates = sorted({rate for row in rows for rate in row["losses"]})
    return [
        {
            "contender": row["contender"],
            **{_rate(rate): _number(row["losses"].get(rate), 4) for rate in rates},
            "chosen": _rate(row["chosen"]),
            "at the edge": "yes" if row["at_edge"] else "no",
            "used": _rate(row["used"]),
        }
        for row in rows
    ]


def _steps(rows: Sequence[Row]) -> list[dict[str, str]]:
    return [
        {
            "contender": row["contender"],
            "layout": row["layout"],
            "held against": row["held_against"] or NOTHING,
            "step, s": _number(row["step_seconds"], 3),
            "times": _number(row["times"], 3),
            "GFLOPs a token": _number(row["flops_per_token"], 3, scale=1e-9),
            "times by FLOPs": _number(row["times_by_flops"], 3),
        }
        for row in rows
    ]


def _diagnostics(rows: Sequence[Row]) -> list[dict[str, str]]:
    return [
        {
            "contender": row["contender"],
            "matrices": str(row["matrices"]),
            "match": _number(row["match_gain"], 3),
            "sources": _number(row["effective_sources"], 1),
            "norm/B": _number(row["norm_ratio_next"], 3),
            "final loss": _number(row["loss"], 4),
            "± seeds": _number(row["loss_stderr"], 4),
        }
        for row in rows
    ]


def finite(value: Any) -> Any:
    """What JSON has a word for: NaN and infinities, of runs that diverged, become text."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
