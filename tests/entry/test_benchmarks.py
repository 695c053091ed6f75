"""The benchmarks of training and of LESA run for real, on a tiny model."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from opt_deus_jax.checkpoints.manifest import read_manifest
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import named_tensors
from opt_deus_jax.reporting.large_expansion import time_matrices
from opt_deus_jax.reporting.turns import Taken, compare, take_turns
from opt_deus_jax.upscaling.forecast import Speed
from opt_deus_jax.upscaling.lesa import MATRICES
from tests.entry.launching import fail, launch, succeed

_CONFIG = "--config=tests/entry/tiny_config.py"


def test_both_trainers_do_the_same_work(base: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    words = ["the", "grown", "model", "computes", "what", "its", "base", "computes"]
    draw = np.random.default_rng(0)
    rows = (json.dumps({"text": " ".join(draw.choice(words, 60))}) for _ in range(40))
    text.write_text("\n".join(rows) + "\n")
    command = (
        "benchmark_train",
        *(_CONFIG, f"--config.base={base}", f"--config.data.train={text}"),
        *("--config.optimizer.learning_rate=0.01", "--config.optimizer.weight_decay=0.1"),
        *(f"--workdir={tmp_path / 'run'}", "--timed_steps=4", "--threads=1"),
    )
    succeed(*command, "--shapes=2x16")
    result = json.loads((tmp_path / "run" / "benchmark_train.json").read_text())
    assert result["cores"] == 1
    ours, theirs = result["2x16"]["programs"]
    assert (ours["program"], theirs["program"]) == ("opt_deus_jax", "torch")
    # Five losses, each after one more update of AdamW than the last, whose size is the rate.
    assert theirs["loss_error"] < 1e-5
    losses = result["2x16"]["steps"]["opt_deus_jax"]["losses"]
    assert len(losses) == 5
    assert abs(losses[4] - losses[0]) > 1e-2
    assert ours["peak_gib"] > 0.05
    assert theirs["memory_ratio"] == pytest.approx(ours["peak_gib"] / theirs["peak_gib"])
    assert "5 steps of 99 take 495" in fail(*command, "--shapes=2x16,99x16")


def test_a_stage_that_fails_ends_the_benchmark_without_a_traceback(
    base: Path, tmp_path: Path
) -> None:
    missing = f"--config.data.train={tmp_path / 'missing.jsonl'}"
    arguments = (_CONFIG, f"--config.base={base}", missing, f"--workdir={tmp_path / 'run'}")
    result = launch("benchmark_train", *arguments)
    assert result.returncode == 1
    assert "missing.jsonl" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: experiments.prepare_data failed")


def test_layouts_are_timed_and_counted(base: Path, tmp_path: Path) -> None:
    shown = succeed(
        "benchmark_layouts",
        *(_CONFIG, f"--config.base={base}", f"--workdir={tmp_path}", "--timed_steps=2"),
    )
    assert "middle" in shown
    result = json.loads((tmp_path / "benchmark_layouts.json").read_text())
    rows = {row["layout"]: row for row in result["layouts"]}
    flops = [rows[layout]["gflops_a_token"] for layout in ("top", "middle", "bottom", "stack")]
    assert flops == sorted(flops)
    assert flops[0] < flops[3]
    assert rows["top"]["error"] == 0
    for layout, row in rows.items():
        assert len(result["seconds"][layout]) == 2
        assert row["step_s"] == pytest.approx(np.median(result["seconds"][layout]))


def test_a_large_expansion_is_killed_gone_on_with_and_checked(base: Path, tmp_path: Path) -> None:
    shape = json.loads((base / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    shown = succeed(
        "benchmark_expand_large",
        *(_CONFIG, f"--config.base={tmp_path / 'shape.json'}", f"--workdir={tmp_path / 'run'}"),
        *("--layers=3", "--gaps=1", "--kills=1"),
    )
    assert "3 -> 4 layers" in shown
    result = json.loads((tmp_path / "run" / "benchmark_expand_large.json").read_text())
    assert result["checked"] == {"copied": 3 * 9, "ends": 2, "fused": 7}
    assert result["layers"] == [3, 4]
    assert len(result["processes"]) == 2
    assert not result["processes"][-1]["was_killed"]
    assert 2**28 < result["peak_bytes"] < 2**31
    assert [row["matrix"] for row in result["matrices"]] == [
        *("query", "key", "value", "output", "gate", "up")
    ]
    for row in result["matrices"]:
        assert row["floor_s"] == pytest.approx(row["products_s"] + row["passes_s"])
        assert row["over_floor"] == pytest.approx(row["seconds"] / row["floor_s"])
    # The weights are gone.
    assert not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.mark.parametrize("epsilon", [None, 0.05])
def test_heads_and_neurons_are_timed_as_wholes_where_they_are_matched_so(
    base: Path, epsilon: float | None
) -> None:
    source = open_checkpoint(str(base))
    config = read_model_config(source.hf_config)
    heads, neurons = time_matrices(source, 0, Speed(1e9, 1e9), "symmetric", epsilon)
    assert [row["matrix"] for row in (heads, neurons)] == ["heads", "neurons"]
    assert (neurons["iterations"] > 0) == (epsilon is not None)
    products = 3 * 2 * config.mlp_width**2 * config.width / 1e9
    assert neurons["products_s"] == pytest.approx(products)
    for row in (heads, neurons):
        assert row["floor_s"] == pytest.approx(row["products_s"] + row["passes_s"])
        assert row["over_floor"] == pytest.approx(row["seconds"] / row["floor_s"])


def test_ratios_are_of_the_first_over_each_and_leave_the_warm_up_out() -> None:
    ours = Taken([9.0, 1.0, 2.0, 1.0], [1.0] * 4, [4.0, 3.0, 2.0, 1.0], 2**30)
    theirs = Taken([1.0, 2.0, 2.0, 8.0], [1.0] * 4, [4.0, 3.0, 2.2, 1.0], 2**31)
    first, second = compare({"ours": ours, "theirs": theirs}, 10)
    assert (first["speed_ratio"], first["memory_ratio"], first["loss_error"]) == (1, 1, 0)
    assert (second["speed_ratio"], second["memory_ratio"]) == (2, 0.5)
    assert second["loss_error"] == pytest.approx(0.1)
    assert (first["tokens_per_second"], second["tokens_per_second"]) == (10, 5)


def test_a_program_that_ends_early_is_named() -> None:
    with pytest.raises(UserError, match="the training by broken ended early"):
        take_turns({"broken": [sys.executable, "-c", "pass"]}, [np.zeros((1, 2), np.int32)])


def test_lesa_is_asked_for_layers_it_has_not_seen(base: Path, tmp_path: Path) -> None:
    arguments = (_CONFIG, f"--config.base={base}", f"--result={tmp_path / 'lesa.json'}")
    # Four layers have no three consecutive ones without the second.
    assert "without layer 1 no three" in fail("benchmark_lesa", *arguments, "--layers=1")
    assert "--layers: give numbers from 1 to 2" in fail("benchmark_lesa", *arguments, "--layers=3")
    assert not (tmp_path / "lesa.json").exists()
    config = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": 6}
    deeper = tmp_path / "deeper"
    deeper.mkdir()
    (deeper / "config.json").write_text(json.dumps(config))
    draw = np.random.default_rng(0)
    first = draw.normal(0, 0.1, (48, 32)).astype(np.float32)
    tensors = {
        name: (draw.normal(0, 0.1, spec.shape) + (spec.init == "ones")).astype(np.float32)
        for name, spec in named_tensors(read_model_config(config), 6)
    }
    # Layers on a line: the mean of the neighbours is exact, and the next is one step off.
    for layer in range(6):
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = (layer + 1) * first
    save_file(tensors, deeper / "model.safetensors", {"format": "pt"})
    shown = succeed(
        *("benchmark_lesa", _CONFIG, f"--config.base={deeper}", "--layers=1,4"),
        f"--result={tmp_path / 'lesa.json'}",
    )
    assert "Relative error of a layer that was left out" in shown
    result = json.loads((tmp_path / "lesa.json").read_text())
    assert result["command"].startswith("python -m experiments.benchmark_lesa --config=tests/")
    rows = {(row["matrix"], row["layer"]): row for row in result["matrices"]}
    assert len(rows) == 7 * 2
    for row in rows.values():
        assert 0 < row["predicted"] < 3
        assert abs(row["cosine"]) <= 1
    for layer in (1, 4):
        assert rows["up", layer]["mean"] < 1e-6
        assert rows["up", layer]["copy_next"] == pytest.approx(1 / (layer + 1), rel=1e-5)
        assert rows["query", layer]["mean"] == pytest.approx(1.22, abs=0.1)


def test_lesa_is_planned_and_grown_on_the_command_line(base: Path, tmp_path: Path) -> None:
    arguments = (_CONFIG, f"--config.base={base}", "--config.upscale.method=lesa")
    assert "lesa, layout top" in " ".join(succeed("plan", *arguments).split())
    shown = succeed("expand", *arguments, f"--workdir={tmp_path / 'run'}")
    assert "What predicts the layer between two" in " ".join(shown.split())
    assert "not an identity" in shown
    manifest = read_manifest(tmp_path / "run" / "expanded")
    assert [line["name"] for line in manifest.diagnostics] == [*MATRICES]
    assert sum(manifest.is_new) == 2
