import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from opt_deus_jax.checkpoints import orbax, saved_step
from opt_deus_jax.checkpoints.manifest import Manifest, write_manifest
from opt_deus_jax.checkpoints.saved_step import find_step
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.training import export
from opt_deus_jax.training.export import export_checkpoint, trained_tensors
from opt_deus_jax.training.segments import plan_segments, select_trained, trained_mask
from opt_deus_jax.training.weights import load_params
from tests.families import write
from tests.training.tiny import tiny_hf_config, tiny_source

IS_NEW = (False, True, False, True)
TRAINED = r"layers\.[13]\.|norm"
SOURCE = tiny_source()
CONFIG = read_model_config(tiny_hf_config())
LOSSES = {10: 0.5, 20: 0.4, 30: None}


class _Place:
    def get_state(self) -> dict[str, int]:
        return {}


def _is_trained(name: str) -> bool:
    return ".1." in name or ".3." in name or "norm" in name


def _values(name: str, step: int) -> np.ndarray:
    return SOURCE.read(name) + np.float32(step) if _is_trained(name) else SOURCE.read(name)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grown model and checkpoints in which every trained number has grown by the step."""
    workdir = tmp_path_factory.mktemp("export")
    (workdir / "expanded").mkdir()
    (workdir / "expanded" / "README.md").write_text("Grown.\n")
    layers = tuple({"depth": depth, "is_new": is_new} for depth, is_new in enumerate(IS_NEW))
    manifest = Manifest("llama_pro", {}, TRAINED, layers, {}, {}, (), {})
    write_manifest(workdir / "expanded", manifest)
    names = select_trained(CONFIG, IS_NEW, TRAINED)
    segments = plan_segments(names.blocks)
    mesh = jax.make_mesh((8,), ("fsdp",))
    trainable = load_params(
        SOURCE,
        CONFIG,
        segments,
        dtype=np.dtype(np.float32),
        shardings=jax.NamedSharding(mesh, jax.P()),
        wanted=trained_mask(CONFIG, segments, names.outer),
    )
    with orbax.open_checkpointer(
        workdir / "checkpoints", save_every=1, last_step=99, keep=9
    ) as checkpointer:
        for step, loss in LOSSES.items():
            grown = jax.tree.map(lambda leaf, step=step: leaf + np.float32(step), trainable)
            trees = {"trainable": grown, "optimizer_state": {"count": grown["final_norm"]}}
            orbax.save(checkpointer, step, trees, _Place(), {}, loss)
    return workdir


def _export(workdir: Path, which: str, directory: Path, **changes: Any) -> int:
    arguments = {"max_shard_bytes": 20_000} | changes
    return export_checkpoint(
        SOURCE, workdir / "expanded", workdir / "checkpoints", which, directory, **arguments
    ).step


@pytest.mark.parametrize(("which", "step"), [("latest", 30), ("best", 20), ("10", 10)])
def test_any_checkpoint_is_exported_in_shards(workdir: Path, tmp_path: Path, which: str, step: int):
    directory = tmp_path / "exported"
    assert _export(workdir, which, directory) == step
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(SOURCE.tensors)
    shards = {shard: load_file(directory / shard) for shard in set(index.values())}
    assert len(shards) > 2
    assert all((directory / shard).stat().st_size < 25_000 for shard in shards)
    for name, shard in index.items():
        np.testing.assert_array_equal(shards[shard][name], _values(name, step))
    assert f"then trained for {step} steps" in (directory / "README.md").read_text()


def test_one_stack_is_in_memory_at_a_time(workdir: Path):
    names, read = trained_tensors(
        find_step(workdir / "checkpoints", "20"), CONFIG, select_trained(CONFIG, IS_NEW, TRAINED)
    )
    assert set(names) == {name for name in SOURCE.tensors if _is_trained(name)}
    before = sum(array.nbytes for array in jax.live_arrays())
    most = 0
    for name in names:
        np.testing.assert_array_equal(read(name), _values(name, 20))
        most = max(most, sum(array.nbytes for array in jax.live_arrays()) - before)
    # Both new layers' gates, the largest stack.
    assert most == 2 * 48 * 32 * 4


def test_a_fused_kernel_is_put_together_of_frozen_and_trained_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = write("phi3", tmp_path / "expanded")
    config = read_model_config(base.hf_config)
    manifest = Manifest("base", {}, "k_proj|gate_proj|up_proj", ({"is_new": False},) * 4, {}, {},
                        (), {})  # fmt: skip
    write_manifest(tmp_path / "expanded", manifest)
    (tmp_path / "expanded" / "README.md").write_text("Grown.\n")
    names = select_trained(config, manifest.is_new, manifest.trained)
    segments = plan_segments(names.blocks, config.layer_kinds)
    trainable = load_params(
        base,
        config,
        segments,
        dtype=np.dtype(np.float32),
        shardings=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        wanted=trained_mask(config, segments, names.outer),
    )
    with orbax.open_checkpointer(
        tmp_path / "checkpoints", save_every=1, last_step=9, keep=9
    ) as checkpointer:
        grown = jax.tree.map(lambda leaf: leaf + np.float32(1), trainable)
        trees = {"trainable": grown, "optimizer_state": {"count": np.zeros(1)}}
        orbax.save(checkpointer, 3, trees, _Place(), {}, None)
    reads = count_reads_of_checkpoints(monkeypatch)
    export_checkpoint(
        base,
        tmp_path / "expanded",
        tmp_path / "checkpoints",
        "latest",
        tmp_path / "exported",
        max_shard_bytes=10**9,
    )
    # Each of the three stacks once, although their tensors are read in turns.
    assert len(reads) == 3
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("expanded", "exported")
    )
    assert before.keys() == after.keys()
    for name, array in before.items():
        expected = array.copy()
        if "qkv" in name:
            expected[32:48] += np.float32(1)
        elif "gate_up" in name:
            expected += np.float32(1)
        np.testing.assert_array_equal(after[name], expected)


def count_reads_of_checkpoints(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    reads: list[Any] = []

    def load_some(saved: Any, trees: Any) -> Any:
        reads.append(trees)
        return saved_step.load_some(saved, trees)

    monkeypatch.setattr(export, "load_some", load_some)
    return reads


def test_what_is_not_there_is_named(workdir: Path, tmp_path: Path):
    with pytest.raises(UserError, match="checkpoint=15: no such step; there are .* 10, 20, 30"):
        _export(workdir, "15", tmp_path / "exported")


def test_a_damaged_checkpoint_is_not_exported(workdir: Path, tmp_path: Path):
    folder = workdir / "checkpoints" / "20" / "trainable"
    largest = max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(content)
    with pytest.raises(UserError, match=r"20: this checkpoint is damaged \(.*\); use another one"):
        _export(workdir, "best", tmp_path / "exported")
    assert not list(tmp_path.iterdir())
    assert _export(workdir, "10", tmp_path / "exported") == 10
