"""Every launcher run for real, one after another, as a user would on a tiny model."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

from opt_deus_jax.checkpoints.manifest import read_manifest
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.config import Experiment
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import named_tensors
from opt_deus_jax.upscaling.identity import streamed_logits

_ROOT = Path(__file__).parents[2]
_CONFIG = "tests/entry/tiny_config.py"
_TEXT = "the grown model computes what its base computes and then it learns more from text"


def _launch(launcher: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{launcher}", *map(str, arguments)],
        cwd=_ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def _succeed(launcher: str, *arguments: object) -> str:
    result = _launch(launcher, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def _fail(launcher: str, *arguments: object) -> str:
    """Runs a launcher that must end with one line of error, which is returned."""
    result = _launch(launcher, *arguments)
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def _text(seed: int, words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(_TEXT.split(), words))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=300,  # pyright: ignore
        special_tokens=["<|end|>"],  # pyright: ignore
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # pyright: ignore
        show_progress=False,  # pyright: ignore
    )
    tokenizer.train_from_iterator([_text(0, 200)], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    hf_config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 304,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(hf_config))
    draw = np.random.default_rng(1)
    tensors = {
        name: np.ones(spec.shape, np.float32)
        if spec.init == "ones"
        else draw.normal(0, 0.1, spec.shape).astype(np.float32)
        for name, spec in named_tensors(read_model_config(hf_config), 4)
    }
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": _text(i, 60)}) + "\n" for i in range(40)))
    return path


@pytest.fixture(scope="module")
def flags(base: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    workdir = tmp_path_factory.mktemp("run")
    common = [f"--config={_CONFIG}", f"--config.base={base}", f"--config.data.train={text}"]
    return [*common, f"--workdir={workdir}"]


@pytest.fixture(scope="module")
def workdir(flags: list[str]) -> Path:
    """The work directory after every stage has been run."""
    directory = Path(flags[-1].removeprefix("--workdir="))
    _succeed("expand", *flags)
    _succeed("prepare_data", *flags)
    _succeed("train", *flags)
    _succeed("export", *flags)
    return directory


def test_plan_shows_layout_and_costs(flags: list[str]) -> None:
    shown = _succeed("plan", *flags[:-1])
    assert shown.count("trained") == 2 + 1
    assert shown.count("frozen") == 4
    parameters = 6 * (2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 304 * 32 + 32
    assert f"{parameters:,}" in shown


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [("1b_shape", "1,722,386,432"), ("8b_shape", "11,520,053,248")],
)
def test_plan_of_the_published_models_needs_no_weights(variant: str, parameters: str) -> None:
    assert parameters in _succeed("plan", f"--config=configs/llama3.py:{variant}")


def test_unknown_variant_of_a_config_is_refused() -> None:
    assert "1b_shape" in _fail("plan", "--config=configs/llama3.py:2b")


@pytest.mark.parametrize(
    ("launcher", "flag"),
    [("plan", "--config"), ("expand", "--workdir"), ("train", "--config"), ("sample", "--top_p")],
)
def test_help_explains_and_lists_the_flags(launcher: str, flag: str) -> None:
    result = _launch(launcher, "--help")
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
    assert "nothing to do" in _succeed("expand", *flags)
    assert (workdir / "expanded/upscale_manifest.json").stat().st_mtime_ns == manifest
    assert "exists" in _fail("export", *flags)
    other = _fail("expand", *flags, "--config.upscale.method=copy_next")
    assert "upscale.method" in other
    assert "--workdir" in other


def test_sample_continues_the_prompt(workdir: Path, base: Path) -> None:
    shown = _succeed(
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
        ("stray", "stray"),
    ],
)
def test_bad_flags_end_in_one_line(
    flags: list[str], tmp_path: Path, argument: str, named: str
) -> None:
    error = _fail("expand", *flags[:-1], f"--workdir={tmp_path}", argument)
    assert named in error
    assert not (tmp_path / "expanded").exists()


def test_stages_out_of_order_say_what_to_run(flags: list[str], tmp_path: Path) -> None:
    error = _fail("train", *flags[:-1], f"--workdir={tmp_path}")
    assert "experiments.expand" in error


def test_empty_corpus_is_refused(flags: list[str], tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    error = _fail(
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
    arguments = (f"--config={_CONFIG}", f"--config.base={small}", f"--config.data.train={text}")
    for launcher in ("expand", "prepare_data"):
        error = _fail(launcher, *arguments, f"--workdir={tmp_path / launcher}")
        assert "100" in error
        assert "tokenizer" in error


def test_every_part_of_the_config_is_recorded(workdir: Path) -> None:
    recorded = json.loads((workdir / "config.json").read_text())
    fields = {field.name for field in dataclasses.fields(Experiment)}
    assert set(recorded) == fields - {"max_shard_bytes"}


def test_benchmark_measures_both_solvers(flags: list[str], tmp_path: Path) -> None:
    arguments = (*flags[:-1], f"--workdir={tmp_path}", "--gaps=1", "--pot_iterations=50")
    assert "speed-up" in _succeed("benchmark_expand", *arguments)
    result = json.loads((tmp_path / "benchmark_expand.json").read_text())
    assert len(result["matrices"]) == 6
    for row in result["matrices"]:
        assert row["lower_bound"] == (row["pot_error"] > row["ours_error"])
        assert row["pot_s"] > 0
        assert row["ours_s"] > 0


def test_readme_names_launchers_fields_and_variants_that_exist() -> None:
    text = (_ROOT / "README.md").read_text() + (_ROOT / "BUILD.md").read_text()
    launchers = set(re.findall(r"experiments\.(\w+)", text))
    assert {"plan", "expand", "prepare_data", "train", "export", "sample"} <= launchers
    for launcher in launchers:
        assert (_ROOT / "experiments" / f"{launcher}.py").exists(), launcher
    for path in re.findall(r"(configs/[a-z]\w+\.py)", text):
        assert (_ROOT / path).exists(), path
    for dotted in re.findall(r"--config\.([a-z_][\w.]*)", text):
        holder: object = Experiment()
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
    shown = _succeed("demo", f"--workdir={tmp_path / 'demo'}", *arguments)
    for launcher in ("plan", "expand", "prepare_data", "train", "export", "sample"):
        assert f"$ python -m experiments.{launcher}" in shown
    assert "bit for bit" in shown
    assert "after 16 steps" in shown
    assert (tmp_path / "demo/exported/model.safetensors").exists()
