"""Files of runs that nobody made, with losses that are known."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

TASKS = ("arc_easy", "logiqa", "winogrande", "commonsense_qa", "boolq", "piqa", "mmlu")
RATES = (5e-4, 1e-3, 2e-3)
MACHINE = {"processor": "abacus", "cores": 2}
RECIPE = {"base": "SmolLM2-135M", "optimizer": {"beta2": 0.95, "clip": 1.0}}


def method(layout: str = "top", weights: str = "copy_next", **changed: Any) -> dict[str, Any]:
    standard = {"zero_init": True, "trained": "new", "transport": ""}
    return {"layout": layout, "weights": weights} | standard | changed


def transport(name: str, layout: str = "top") -> dict[str, Any]:
    return method(layout, "transport", transport=name)


def a_run(contender: str = "copy_next", **changed: Any) -> dict[str, Any]:
    """The content of a file; `final` sets the last held-out loss."""
    final, steps = changed.pop("final", 2.7), changed.get("steps", 100)
    curve = [final + (3.24 - final) * (1 - k / 5) ** 2 for k in range(6)]
    content = {
        "contender": contender,
        "kind": "final",
        "seed": 0,
        "learning_rate": 1e-3,
        "upscale": {"method": "copy_next"},
        "base_sha256": "0a",
        "method": method(),
        "steps": steps,
        "tokens_per_step": 1024,
        "held_out": [
            {"step": k * steps // 5, "tokens": k * steps // 5 * 1024, "loss": loss}
            for k, loss in enumerate(curve)
        ],
        "training_losses": [[10, 3.0]],
        "accuracies": {},
        "word_perplexity": None,
        "step_seconds": 4.0,
        "tokens_per_second": 256.0,
        "model_flops_per_token": 8e8,
        "parameters": 188_000_000,
        "trained_parameters": 53_000_000,
        "diagnostics": [],
        "identity": {"bit_identical": True},
        "recipe": RECIPE,
        "machine": MACHINE,
        "command": "python -m experiments.compare",
    }
    return content | changed


def write(folder: Path, *contents: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for content in contents:
        name = f"{content['contender']}_{content['kind']}_{content['seed']}"
        rate = f"_{content['learning_rate']:.3g}" if content["kind"] == "sweep" else ""
        (folder / f"{name}{rate}.json").write_text(json.dumps(content))
    return folder


def contenders() -> dict[str, dict[str, Any]]:
    found = {
        "copy_next": method(),
        "opt_deus_barycentric": transport("barycentric"),
        "copy_previous": method(weights="copy_previous"),
        "opt_deus_reference": transport("reference"),
        "random": method(weights="random"),
        "opt_deus_assignment": transport("assignment"),
        "average_zero": method(weights="average"),
        "half_next": method(weights="half_next"),
        "average": method(weights="average", zero_init=False),
        "base": method(weights="", zero_init=False, trained="all"),
        "llama_pro": method("uniform", "copy_previous"),
        "solar": method("stack", "", zero_init=False, trained="all"),
    }
    for layout in ("middle", "bottom", "top_and_bottom"):
        found[f"copy_next_{layout}"] = method(layout)
        found[f"opt_deus_{layout}"] = transport("barycentric", layout)
    return found


def a_comparison(names: Iterable[str], seeds: int = 3) -> list[dict[str, Any]]:
    """Sweeps and final runs of some of the contenders."""
    draw = np.random.default_rng(0)
    order = draw.normal(0, 0.02, seeds)
    contents = []
    flops = {"middle": 8.6e8, "bottom": 9.2e8, "top_and_bottom": 9.2e8, "uniform": 9.1e8}
    for name in names:
        chosen = contenders()[name]
        worth = float(draw.normal(2.72, 0.025)) + (0.4 if name == "solar" else 0.0)
        cost = flops.get(chosen["layout"], 1.2e9 if chosen["trained"] == "all" else 8e8)
        shared = {"method": chosen, "model_flops_per_token": cost}
        if chosen["weights"] == "transport":
            shared["diagnostics"] = [
                {"depth": 16 + k, "name": "query", "norm_ratio_previous": 0.5}
                | dict(
                    match_gain=float(draw.uniform(0.84, 0.99)),
                    effective_sources=float(draw.uniform(1, 40)),
                    norm_ratio_next=float(draw.uniform(0.4, 0.7)),
                )
                for k in range(4)
            ]
        best = draw.integers(0, len(RATES))
        for k, rate in enumerate(RATES):
            loss = worth + 0.2 + 0.05 * (k - best) ** 2
            tried = a_run(
                name, kind="sweep", seed=1000, learning_rate=rate, steps=20, final=loss, **shared
            )
            del tried["accuracies"], tried["word_perplexity"]
            contents.append(tried)
        for number in range(seeds):
            final = worth + order[number] + float(draw.normal(0, 0.004))
            accuracies = {
                task: {"acc": float(draw.normal(0.45, 0.03)), "acc_stderr": 0.05, "questions": 40}
                for task in TASKS
            }
            seconds = 4.0 * cost / 8e8 * float(draw.normal(1, 0.02))
            contents.append(
                a_run(
                    name,
                    seed=number,
                    learning_rate=RATES[best],
                    final=final,
                    accuracies=accuracies,
                    word_perplexity=float(np.exp(final + 0.4)),
                    step_seconds=seconds,
                    tokens_per_second=1024 / seconds,
                    **shared,
                )
            )
    return contents
