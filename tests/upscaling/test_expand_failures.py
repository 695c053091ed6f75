"""Whatever goes wrong in an expansion, no folder is left that could be taken for a checkpoint.

What is refused leaves nothing; what is cut short leaves a partial folder, see test_expand_resumed.
"""

import errno
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from opt_deus_jax.checkpoints import hf
from opt_deus_jax.config import UpscaleConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.upscaling import expand, grown_tensors, identity
from tests.llama_checkpoints import hf_config, random_tensors, source_of, tokens, write_directory

CONFIG = hf_config(intermediate_size=32, num_key_value_heads=4)
GATE = "model.layers.{}.mlp.gate_proj.weight"


def run(directory, source, **fields):
    settings = {"method": "copy_next", "num_new_layers": 2} | fields
    return expand.expand_checkpoint(
        source,
        UpscaleConfig(**settings),
        directory / "grown",
        probe_BT=tokens(),
        max_shard_bytes=30_000,
    )


def assert_refused(directory, message, source=None, **fields):
    with pytest.raises(UserError, match=message) as caught:
        run(directory, source or source_of(CONFIG, random_tensors(CONFIG)), **fields)
    assert "\n" not in str(caught.value)
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_new_layers": 6}, "num_new_layers=6: layout 'top' has only 5 gaps .* at most 5"),
        ({"num_new_layers": 0}, "num_new_layers=0: method 'copy_next' needs at least one"),
        ({"layout": "uniform", "num_new_layers": 4}, "num_new_layers=4: .*divisor"),
        ({"layout": "explicit", "gaps": (7,)}, r"upscale.gaps=\(7,\)"),
        ({"method": "dus"}, "upscale.method='dus'"),
        ({"method": "solar", "num_new_layers": 7}, "num_new_layers=7"),
    ],
)
def test_fields_that_do_not_fit_the_base(tmp_path, fields, message):
    assert_refused(tmp_path, message, **fields)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layer", [0, 4])
@pytest.mark.parametrize("method", ["copy_next", "random", "base"])
def test_a_tensor_that_is_not_finite(tmp_path, value, layer, method):
    tensors = random_tensors(CONFIG)
    tensors[GATE.format(layer)][3, 5] = value
    source = source_of(CONFIG, tensors)
    fields = {"method": method, "num_new_layers": 0 if method == "base" else 2}
    message = f"some/base: tensor {GATE.format(layer)} holds NaN or Inf; fetch"
    assert_refused(tmp_path, message, source, **fields)


def test_a_folder_that_exists_is_kept(tmp_path):
    (tmp_path / "grown").mkdir()
    (tmp_path / "grown" / "mine").write_text("x")
    source = source_of(CONFIG, random_tensors(CONFIG))
    with pytest.raises(UserError, match="grown: exists; delete it or choose"):
        run(tmp_path, source)
    assert [path.name for path in tmp_path.rglob("*")] == ["grown", "mine"]


def test_a_full_disk_is_foreseen(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    block = 7 * 32 * 32 + 2 * 32
    needed = f"{4 * (8 * block + 97 * 32 + 32):,}"
    assert_refused(tmp_path, f"grown: no space left .* {needed} bytes are needed and 1,000 free")


def test_a_disk_that_fills_up_midway(tmp_path, monkeypatch):
    written = []

    def fsync(descriptor):
        written.append(os.fstat(descriptor).st_size)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = source_of(CONFIG, random_tensors(CONFIG))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        message = "grown: no space left on the device, .* bytes are needed; free some and start"
        with pytest.raises(UserError, match=message):
            run(tmp_path, source)
    assert len(written) == 3
    assert min(written) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["grown.partial"]
    assert run(tmp_path, source).identity.bit_identical
    assert [path.name for path in tmp_path.iterdir()] == ["grown"]


def test_a_shard_that_vanishes_midway(tmp_path):
    source = source_of(CONFIG, random_tensors(CONFIG))
    calls = []

    def read(name):
        calls.append(name)
        if len(calls) == 20:
            raise FileNotFoundError("model-00002-of-00002.safetensors")
        return random_tensors(CONFIG)[name]

    broken = hf.CheckpointSource(source.name, source.hf_config, source.tensors, read, {})
    with pytest.raises(FileNotFoundError):
        run(tmp_path, broken)
    assert [path.name for path in tmp_path.iterdir()] == ["grown.partial"]


def test_the_manifest_is_written_last_and_before_the_folder_has_its_name(tmp_path, monkeypatch):
    seen = []

    def stop(directory, manifest):
        seen.append((directory.name, sorted(path.name for path in directory.iterdir())))
        raise KeyboardInterrupt

    monkeypatch.setattr(expand, "write_manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, source_of(CONFIG, random_tensors(CONFIG)))
    [(name, files)] = seen
    assert name == "grown.partial"
    assert {"config.json", "README.md", hf.INDEX_FILE} <= set(files)
    assert "upscale_manifest.json" not in files
    assert [path.name for path in tmp_path.iterdir()] == ["grown.partial"]


@pytest.mark.parametrize("kernel", ["down_kernel", "output_kernel"])
def test_an_output_kernel_that_is_not_zero_is_caught(tmp_path, monkeypatch, kernel):
    fuse = grown_tensors.fuse_blocks

    def broken(*parents, **options):
        fused = fuse(*parents, **options)
        fused.block[kernel][0, 0] = 1e-3
        return fused

    monkeypatch.setattr(grown_tensors, "fuse_blocks", broken)
    assert_refused(tmp_path, r"grown: the grown model is not its base \(logits differ by up to ")
    # Where no identity is promised there is none to be broken.
    made = run(tmp_path, source_of(CONFIG, random_tensors(CONFIG)), zero_init=False)
    assert not made.identity.bit_identical


def test_an_old_layer_that_is_moved_is_caught(tmp_path, monkeypatch):
    write = expand.write_shard

    def swapped(directory, shard, read, **options):
        def read_other(name):
            return read(name)[::-1] if name == GATE.format(1) else read(name)

        write(directory, shard, read_other, **options)

    monkeypatch.setattr(expand, "write_shard", swapped)
    assert_refused(tmp_path, "grown: the grown model is not its base")


def test_a_fused_kernel_too_large_for_its_dtype_is_refused(tmp_path, monkeypatch):
    fuse = grown_tensors.fuse_blocks

    def broken(*parents, **options):
        fused = fuse(*parents, **options)
        fused.block["gate_kernel"] = np.full((32, 32), np.inf, np.float32)
        return fused

    monkeypatch.setattr(grown_tensors, "fuse_blocks", broken)
    assert_refused(tmp_path, "new layer 4: gate_kernel is not finite after fusion; raise upscale")


def test_logits_that_are_not_finite_are_refused():
    # Finite weights whose products are not: 1e30 squared is beyond float32.
    tensors = random_tensors(CONFIG)
    for layer in range(6):
        tensors[GATE.format(layer)] *= np.float32(1e30)
        tensors[GATE.format(layer).replace("gate", "up")] *= np.float32(1e30)
    source = source_of(CONFIG, tensors)
    with pytest.raises(UserError, match="some/base: its logits are not finite; the weights are"):
        identity.compare_to_base(source, source, tokens())


def test_one_changed_bit_is_not_identical():
    tensors = random_tensors(CONFIG)
    other = {name: array.copy() for name, array in tensors.items()}
    norm = other["model.norm.weight"]
    norm[0] = np.nextafter(norm[0], np.float32(2))
    same = identity.compare_to_base(
        source_of(CONFIG, tensors), source_of(CONFIG, dict(tensors)), tokens()
    )
    report = identity.compare_to_base(
        source_of(CONFIG, tensors), source_of(CONFIG, other), tokens()
    )
    assert same.bit_identical
    assert not report.bit_identical
    assert 0 < report.max_difference < 1e-5
    assert report.tokens == tokens().size


def test_a_plan_that_does_not_converge(tmp_path):
    # So little entropy that 20,000 iterations do not reach the marginals in float32.
    message = "new layer 4: transport of .* did not converge .* raise upscale.epsilon"
    assert_refused(tmp_path, message, method="opt_deus", epsilon=1e-6)


def test_logits_are_the_same_in_parts_of_the_vocabulary(tmp_path, monkeypatch):
    tensors = random_tensors(CONFIG)
    stored = write_directory(tmp_path / "base", CONFIG, tensors)
    expected = identity.streamed_logits(source_of(CONFIG, tensors), tokens())
    monkeypatch.setattr(identity, "_ROWS_AT_ONCE", 40)
    for source in (source_of(CONFIG, tensors), hf.open_hf_directory(stored, "base")):
        np.testing.assert_allclose(
            identity.streamed_logits(source, tokens()), expected, rtol=0, atol=1e-6
        )
