"""Every launcher run for real, one after another, as a user would on a tiny model."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from opt_deus_jax.checkpoints.manifest import read_manifest
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.config import Comparison, Experiment
from opt_deus_jax.upscaling.identity import streamed_logits
from tests.entry.launching import CONFIG, ROOT, environment, fail, launch, launch_together, succeed


def test_plan_shows_layout_and_costs(flags: list[str]) -> None:
    shown = succeed("plan", *flags[:-1])
    assert shown.count("trained") == 2 + 1
    assert shown.count("frozen") == 4
    parameters = 6 * (2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 304 * 32 + 32
    assert f"{parameters:,}" in shown


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [
        ("llama3.py:1b_shape", "1,722,386,432"),
        ("llama3.py:8b_shape", "11,520,053,248"),
        # 235,093,634,560 as published, and twelve layers of 2,487,755,008.
        ("qwen3_moe.py:235b_shape", "264,946,694,656"),
    ],
)
def test_plan_of_the_published_models_needs_no_weights(variant: str, parameters: str) -> None:
    shown = succeed("plan", f"--config=configs/{variant}")
    assert parameters in shown
    assert "GiB of memory" in shown


def test_unknown_variant_of_a_config_is_refused() -> None:
    assert "1b_shape" in fail("plan", "--config=configs/llama3.py:2b")


@pytest.mark.parametrize(
    ("launcher", "flag"),
    [
        *(("plan", "--config"), ("expand", "--workdir"), ("train", "--config")),
        *(("sample", "--top_p"), ("benchmark_lesa", "--layers")),
    ],
)
def test_help_explains_and_lists_the_flags(launcher: str, flag: str) -> None:
    result = launch(launcher, "--help")
    assert f"python -m experiments.{launcher}" in result.stdout
    assert flag in result.stdout


def test_work_directory_holds_what_the_design_says(workdir: Path) -> None:
    for name in (
        "config.json",
        "expanded/upscale_manifest.json",
        "expanded/diagnostics.png",
        "records/records.json",
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
        "loss.png",
        "exported/model.safetensors",
        "exported/README.md",
    ):
        assert (workdir / name).exists(), name
    assert read_manifest(workdir / "expanded").identity["bit_identical"]


def test_exported_model_equals_transformers(workdir: Path) -> None:
    source = open_checkpoint(str(workdir / "exported"))
    tokens = np.random.default_rng(3).integers(0, 304, (2, 20)).astype(np.int32)
    model = AutoModelForCausalLM.from_pretrained(workdir / "exported").eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(streamed_logits(source, tokens), expected, atol=1e-4, rtol=0)


def test_only_new_layers_were_trained(workdir: Path) -> None:
    expanded = open_checkpoint(str(workdir / "expanded"))
    exported = open_checkpoint(str(workdir / "exported"))
    is_new = read_manifest(workdir / "expanded").is_new
    new_prefixes = tuple(f"model.layers.{i}." for i, new in enumerate(is_new) if new)
    for name in expanded.tensors:
        same = np.array_equal(expanded.read(name), exported.read(name))
        # The embedding is tied and frozen; a new layer's kernels all move within six steps.
        assert same != name.startswith(new_prefixes), name


def test_running_again_does_nothing_or_refuses(workdir: Path, flags: list[str]) -> None:
    manifest = (workdir / "expanded/upscale_manifest.json").stat().st_mtime_ns
    assert "nothing to do" in succeed("expand", *flags)
    assert (workdir / "expanded/upscale_manifest.json").stat().st_mtime_ns == manifest
    assert "exists" in fail("export", *flags)
    other = fail("expand", *flags, "--config.upscale.method=copy_next")
    assert "upscale.method" in other
    assert "--workdir" in other


def test_two_processes_grow_the_model_of_one(flags: list[str], tmp_path: Path) -> None:
    arguments = [*flags[:-1], "--config.max_shard_bytes=20000"]
    succeed("expand", *arguments, f"--workdir={tmp_path / 'one'}")
    first, second = launch_together("expand", 2, *arguments, f"--workdir={tmp_path}")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "bit for bit" in first.stdout
    assert second.stdout == ""
    one, two = (
        {path.name: path.read_bytes() for path in (folder / "expanded").iterdir()}
        for folder in (tmp_path / "one", tmp_path)
    )
    assert len(one) > 8
    assert one == two


def test_sample_continues_the_prompt(workdir: Path, base: Path) -> None:
    shown = succeed(
        "sample",
        f"--model={base}",
        f"--model={workdir / 'exported'}",
        "--prompt=the grown model",
        "--max_new_tokens=5",
    )
    assert shown.count("the grown model") == 2


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--config.upscale.metod=average", "metod"),
        ("--config.upscale.method=averge", "upscale.method"),
        ("--config.upscale.layout=topp", "upscale.layout"),
        ("--config.upscale.num_new_layers=9", "upscale.num_new_layers"),
        ("--config.base=nowhere/at-all", "base"),
        ("--gaps_at_once=99", "--gaps_at_once=99: each gap takes a device, and this process has"),
        ("stray", "stray"),
    ],
)
def test_bad_flags_end_in_one_line(
    flags: list[str], tmp_path: Path, argument: str, named: str
) -> None:
    error = fail("expand", *flags[:-1], f"--workdir={tmp_path}", argument)
    assert named in error
    assert not (tmp_path / "expanded").exists()


def test_stages_out_of_order_say_what_to_run(flags: list[str], tmp_path: Path) -> None:
    error = fail("train", *flags[:-1], f"--workdir={tmp_path}")
    assert "experiments.expand" in error


def test_empty_corpus_is_refused(flags: list[str], tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    error = fail(
        "prepare_data", *flags[:-1], f"--workdir={tmp_path}", f"--config.data.train={empty}"
    )
    assert "data.train" in error or "empty" in error


def test_tokenizer_that_does_not_fit_is_refused(base: Path, text: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    hf_config = json.loads((base / "config.json").read_text()) | {"vocab_size": 100}
    (small / "config.json").write_text(json.dumps(hf_config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (small / file).write_bytes((base / file).read_bytes())
    source = open_checkpoint(str(base))
    tensors = {name: source.read(name) for name in source.tensors}
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:100].copy()
    save_file(tensors, small / "model.safetensors", {"format": "pt"})
    arguments = (f"--config={CONFIG}", f"--config.base={small}", f"--config.data.train={text}")
    for launcher in ("expand", "prepare_data"):
        error = fail(launcher, *arguments, f"--workdir={tmp_path / launcher}")
        assert "100" in error
        assert "tokenizer" in error


def test_a_tokenizer_that_only_fits_by_size_is_refused(workdir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(workdir / "exported", model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    error = fail("sample", f"--model={model}", "--prompt=the")
    assert f"{model}: tokenizer.json is not the one that the model was grown with" in error


def test_every_part_of_the_config_is_recorded(workdir: Path) -> None:
    recorded = json.loads((workdir / "config.json").read_text())
    fields = {field.name for field in dataclasses.fields(Experiment)}
    assert set(recorded) == fields - {"max_shard_bytes", "evaluation"}


def test_a_mistyped_base_can_be_put_right(base: Path, tmp_path: Path) -> None:
    command = ("prepare_data", f"--config={CONFIG}", f"--workdir={tmp_path}")
    fail(*command, f"--config.base={tmp_path / 'no_such_folder'}")
    error = fail(*command, f"--config.base={base}", f"--config.data.train={tmp_path / 'no_text'}")
    assert "no_text" in error


def test_benchmark_measures_both_solvers(flags: list[str], tmp_path: Path) -> None:
    arguments = (*flags[:-1], f"--workdir={tmp_path}", "--gaps=1", "--pot_iterations=50")
    assert "speed-up" in succeed("benchmark_expand", *arguments)
    result = json.loads((tmp_path / "benchmark_expand.json").read_text())
    assert len(result["matrices"]) == 6
    for row in result["matrices"]:
        assert row["lower_bound"] == (row["pot_error"] > row["ours_error"])
        assert row["pot_s"] > 0
        assert row["ours_s"] > 0


def test_readme_names_launchers_fields_and_variants_that_exist() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "BUILD.md").read_text()
    launchers = set(re.findall(r"experiments\.(\w+)", text))
    assert {"plan", "expand", "prepare_data", "train", "export", "sample"} <= launchers
    for launcher in launchers:
        assert (ROOT / "experiments" / f"{launcher}.py").exists(), launcher
    for path in re.findall(r"(configs/[a-z]\w+\.py)", text):
        assert (ROOT / path).exists(), path
    for dotted in re.findall(r"--config\.([a-z_][\w.]*)", text):
        holder: object = Experiment()
        if not hasattr(holder, dotted.partition(".")[0]):
            holder = Comparison()
        for name in dotted.split("."):
            holder = getattr(holder, name)


def test_demo_runs_every_stage(base: Path, text: Path, tmp_path: Path) -> None:
    overrides = {
        "base": base,
        "upscale.num_new_layers": 2,
        "data.train": text,
        "data.held_out_fraction": 0.3,
        "data.sequence_length": 16,
        "training.steps": 16,
        "training.evaluate_every": 8,
    }
    arguments = [f"--set=--config.{field}={value}" for field, value in overrides.items()]
    shown = succeed("demo", f"--workdir={tmp_path / 'demo'}", *arguments)
    for launcher in ("plan", "expand", "prepare_data", "train", "export", "sample"):
        assert f"$ python -m experiments.{launcher}" in shown
    assert "bit for bit" in shown
    assert "after 16 steps" in shown
    # What the grown model continues is held against its own base.
    assert f"--model={base}" in shown
    assert (tmp_path / "demo/exported/model.safetensors").exists()


def test_what_solves_no_transport_imports_no_solver() -> None:
    """Launchers would otherwise take seconds longer to start."""
    for launcher in ("train", "evaluate"):
        code = f"import experiments.{launcher}, sys; print(*sys.modules)"
        command = [sys.executable, "-c", code]
        imported = subprocess.check_output(command, cwd=ROOT, env=environment(), text=True)
        assert not {"ott", "torch", "lm_eval"} & set(imported.split())
