"""Safetensors in and out, and folders that appear only when they are whole."""

import errno
import json
import shutil
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from opt_deus_jax.checkpoints import hf
from opt_deus_jax.checkpoints.source import TensorInfo
from opt_deus_jax.errors import UserError
from opt_deus_jax.whole_files import write_json
from tests.llama_checkpoints import hf_config, load_directory, random_tensors, write_directory

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
CONFIG = hf_config(num_hidden_layers=2)


def mixed_tensors():
    drawn = random_tensors(CONFIG, dtype=np.float64)
    return {name: a.astype(DTYPES[i % 4]) for i, (name, a) in enumerate(drawn.items())}


def write_back(directory, source, max_shard_bytes):
    directory.mkdir()
    hf.write_weights(directory, source.tensors.items(), source.read, max_shard_bytes)
    write_json(directory / "config.json", source.hf_config)


def assert_same_tensors(source, tensors):
    assert source.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        array = source.read(name)
        info = source.tensors[name]
        assert (info.shape, info.dtype) == (array.shape, array.dtype)
        assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
        assert array.tobytes() == expected.tobytes()


@pytest.mark.parametrize("shards_in", [1, 3])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000, 1])
def test_a_round_trip_keeps_every_bit_and_dtype(tmp_path, shards_in, max_shard_bytes):
    tensors = mixed_tensors()
    write_directory(tmp_path / "in", CONFIG, tensors, shards_in)
    source = hf.open_hf_directory(tmp_path / "in", "in")
    assert {info.dtype for info in source.tensors.values()} == {np.dtype(d) for d in DTYPES}
    assert_same_tensors(source, tensors)

    write_back(tmp_path / "out", source, max_shard_bytes)
    assert_same_tensors(hf.open_hf_directory(tmp_path / "out", "out"), tensors)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    if max_shard_bytes == 10**9:
        assert [file.name for file in files] == ["model.safetensors"]
        assert not (tmp_path / "out" / hf.INDEX_FILE).exists()
        return
    expected = len(tensors) if max_shard_bytes == 1 else len(files)
    assert expected > 1
    names = [f"model-{i + 1:05d}-of-{expected:05d}.safetensors" for i in range(expected)]
    assert [file.name for file in files] == names
    index = json.loads((tmp_path / "out" / hf.INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors.values())
    for file in files:
        # The safetensors package reads each file too, and the index names what is in it.
        content = load_file(file)
        assert content.keys() == {k for k, v in index["weight_map"].items() if v == file.name}
        size = sum(array.nbytes for array in content.values())
        assert size <= max_shard_bytes or len(content) == 1


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_transformers_loads_what_is_written(tmp_path, dtype, max_shard_bytes):
    tensors = random_tensors(CONFIG, dtype=dtype)
    source = hf.open_hf_directory(write_directory(tmp_path / "in", CONFIG, tensors), "in")
    write_back(tmp_path / "out", source, max_shard_bytes)
    state = load_directory(tmp_path / "out").state_dict()
    for name, array in tensors.items():
        np.testing.assert_array_equal(state[name].numpy(), array.astype(np.float32))


def test_a_dtype_without_a_meaning_here_is_refused(tmp_path):
    tensors = random_tensors(CONFIG)
    tensors["model.norm.weight"] = np.ones(32, np.int8)  # pyright: ignore
    directory = write_directory(tmp_path / "in", CONFIG, tensors)
    with pytest.raises(UserError, match="model.norm.weight has dtype I8; use a checkpoint in"):
        hf.open_hf_directory(directory, "in")


def test_a_cut_file_is_refused_wherever_the_cut_is(tmp_path):
    directory = write_directory(tmp_path / "in", CONFIG, random_tensors(CONFIG))
    path = directory / "model.safetensors"
    content = path.read_bytes()
    for cut in (0, 7, 8, 100, 3000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(UserError, match="model.safetensors: damaged .* fetch it") as caught:
            hf.open_hf_directory(directory, "in")
        assert "\n" not in str(caught.value)


def edit_index(directory, change):
    path = directory / hf.INDEX_FILE
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


NORM, SHARD = "model.norm.weight", "model-00001-of-00003.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop(NORM), f"index.json: tensor {NORM} of model-.* has no entry; fetch"),
        (lambda m: m.update({"ghost": SHARD}), f"tensor ghost is not in {SHARD}; fetch"),
        (lambda m: m.update({NORM: SHARD}), f"tensor {NORM} is not in {SHARD}; fetch"),
        (
            lambda m: m.update({"x": "lost.safetensors"}),
            "lost.safetensors: shard is missing; fetch",
        ),
        (lambda m: m.update({"x": "../x.safetensors"}), "'../x.safetensors' for tensor x, not the"),
        (lambda m: m.update({"x": 3}), "weight_map gives 3 for tensor x"),
        (lambda m: m.clear(), "index.json: field weight_map is missing or empty; fetch"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path, change, message):
    directory = write_directory(tmp_path / "in", CONFIG, random_tensors(CONFIG), shards=3)
    where = json.loads((directory / hf.INDEX_FILE).read_text())["weight_map"][NORM]
    assert where != SHARD
    edit_index(directory, change)
    with pytest.raises(UserError, match=message) as caught:
        hf.open_hf_directory(directory, "in")
    assert "\n" not in str(caught.value)


def test_a_missing_shard_and_a_tensor_in_two_shards_are_refused(tmp_path):
    directory = write_directory(tmp_path / "in", CONFIG, random_tensors(CONFIG), shards=3)
    other = SHARD.replace("00001", "00002", 1)
    shutil.copy(directory / SHARD, directory / other)
    with pytest.raises(UserError, match=f"{other}: tensor .* is also in {SHARD}"):
        hf.open_hf_directory(directory, "in")
    (directory / other).unlink()
    with pytest.raises(UserError, match=f"{other}: shard is missing; fetch it again"):
        hf.open_hf_directory(directory, "in")


def test_pickled_weights_are_never_loaded(tmp_path):
    directory = write_directory(tmp_path / "in", CONFIG, random_tensors(CONFIG))
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")
    with pytest.raises(UserError, match="in: pickled weights, which are never loaded: no model"):
        hf.open_hf_directory(directory, "in")
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="in: no model.safetensors and no .*; save the model as"):
        hf.open_hf_directory(directory, "in")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"", b"\xff\xfe\x00", None])
def test_a_config_that_is_not_json_is_refused(tmp_path, content):
    directory = write_directory(tmp_path / "in", CONFIG, random_tensors(CONFIG))
    if content is None:
        (directory / "config.json").unlink()
    else:
        (directory / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="config.json: not .*; (fetch it again|give a)") as caught:
        hf.open_hf_directory(directory, "in")
    assert "\n" not in str(caught.value)


def test_side_files_are_carried_byte_for_byte(tmp_path):
    directory = write_directory(tmp_path / "in", CONFIG, random_tensors(CONFIG))
    files = {"tokenizer.json": b"{}\r\n", "LICENSE": b"\xff\x00", "generation_config.json": b"{}"}
    for name, content in {**files, "training_args.bin": b"1", "README.md": b"base"}.items():
        (directory / name).write_bytes(content)
    assert hf.open_hf_directory(directory, "in").side_files == files


def test_a_tensor_that_is_not_as_planned_is_an_error(tmp_path):
    info = TensorInfo((2, 3), np.dtype(np.float32))
    with pytest.raises(ValueError, match="w: got"):
        hf.write_weights(tmp_path, [("w", info)], lambda name: np.zeros((3, 2), np.float32), 10**9)
    with pytest.raises(ValueError, match="w: got"):
        hf.write_weights(tmp_path, [("w", info)], lambda name: np.zeros((2, 3)), 10**9)


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    seen = []

    def fill(partial):
        (partial / "a").write_text("x")
        seen.append((partial.exists(), target.exists()))

    hf.create_directory(target, 1, fill)
    assert seen == [(True, False)]
    assert [path.name for path in target.iterdir()] == ["a"]
    assert list(target.parent.iterdir()) == [target]
    with pytest.raises(UserError, match="out: exists; delete it or choose another --workdir"):
        hf.create_directory(target, 1, fill)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (OSError(errno.ENOSPC, "full"), UserError, "out: no space left .* 123,456 bytes .*free"),
        (OSError(errno.EIO, "broken"), OSError, "broken"),
        (UserError("bad tensor"), UserError, "bad tensor"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_an_interrupted_write_leaves_nothing(tmp_path, raised, expected, message):
    def fill(partial):
        (partial / "model.safetensors").write_text("half")
        raise raised

    with pytest.raises(expected, match=message) as caught:
        hf.create_directory(tmp_path / "out", 123_456, fill)
    assert type(caught.value) is expected
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_not_taken_for_a_checkpoint_and_goes(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "stale").write_text("x")
    hf.create_directory(tmp_path / "out", 1, lambda partial: None)
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_a_full_disk_is_foreseen(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=999))
    with pytest.raises(
        UserError, match="out: no space left .* 1,000 bytes are needed and 999 free"
    ):
        hf.create_directory(tmp_path / "out", 1000, lambda partial: None)
    assert list(tmp_path.iterdir()) == []
    hf.create_directory(tmp_path / "out", 999, lambda partial: None)


def test_hashes_are_of_content_and_not_of_order():
    a, b = np.arange(6, dtype=np.float32), np.arange(6, dtype=np.float32) + 1
    assert hf.hash_array(a) == hf.hash_array(a.copy())
    assert hf.hash_array(a.reshape(2, 3).T) == hf.hash_array(a.reshape(2, 3).T.copy())
    assert hf.hash_array(a) != hf.hash_array(b)
    assert hf.combine_hashes({"x": "1", "y": "2"}) == hf.combine_hashes({"y": "2", "x": "1"})
    assert hf.combine_hashes({"x": "1", "y": "2"}) != hf.combine_hashes({"x": "2", "y": "1"})
