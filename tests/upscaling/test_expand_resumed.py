"""Expansions that are killed and gone on with end in the same bytes."""

import dataclasses
import fcntl
import functools
import json
import signal
import time

import numpy as np
import pytest

from opt_deus_jax.checkpoints import journal
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.config import UpscaleConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.reporting.plots import plot_diagnostics
from opt_deus_jax.upscaling import expand, grown_tensors
from tests.llama_checkpoints import hf_config, random_tensors, source_of, tokens, write_directory

CONFIG = hf_config(intermediate_size=32, num_key_value_heads=4)
SHARD = 30_000
PATIENCE = 120


@functools.cache
def tensors_of(seed=0):
    return random_tensors(CONFIG, seed)


def run(directory, source, max_shard_bytes=SHARD, say=lambda line: None, **fields):
    settings = {"method": "opt_deus", "num_new_layers": 3} | fields
    return expand.expand_checkpoint(
        source,
        UpscaleConfig(**settings),
        directory / "grown",
        probe_BT=tokens(),
        max_shard_bytes=max_shard_bytes,
        draw=plot_diagnostics,
        say=say,
    )


def content(directory):
    return {path.name: path.read_bytes() for path in (directory / "grown").iterdir()}


def written(directory):
    return journal.count_written(directory / "grown.partial")


class Killed(BaseException):
    """Nothing in the library catches it."""


def killed_after(number):
    """A base of which only so many tensors can be read."""
    source = source_of(CONFIG, tensors_of())
    reads = []

    def read(name):
        reads.append(name)
        if len(reads) > number:
            raise Killed
        return source.read(name)

    return dataclasses.replace(source, read=read)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    made = run(directory, source_of(CONFIG, tensors_of()))
    return content(directory), made


def expand_slowly(base, directory):
    source = open_checkpoint(str(base))

    def read(name):
        time.sleep(0.02)
        return source.read(name)

    run(directory, dataclasses.replace(source, read=read))


def test_a_process_that_is_killed_at_any_moment_ends_in_the_same_bytes(children, tmp_path):
    base = write_directory(tmp_path / "base", CONFIG, tensors_of(), shards=2)
    # The first, within a copied layer, within a new one, and close to the end.
    for tensors in (1, 11, 39, 63, 78):
        process = children.Process(target=expand_slowly, args=(base, tmp_path / "killed"))
        (tmp_path / "killed").mkdir(exist_ok=True)
        process.start()
        deadline = time.monotonic() + PATIENCE
        while written(tmp_path / "killed") < tensors:
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert [path.name for path in (tmp_path / "killed").iterdir()] == ["grown.partial"]
    said = []
    made = run(tmp_path / "killed", open_checkpoint(str(base)), say=said.append)
    expected = run(tmp_path / "whole", open_checkpoint(str(base)))
    assert "tensors are written, and kept" in said[0]
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert (made.manifest, made.reports) == (expected.manifest, expected.reports)


@pytest.mark.parametrize("reads", [0, 31, 75, 140])
def test_what_is_written_is_kept(tmp_path, uninterrupted, monkeypatch, reads):
    with pytest.raises(Killed):
        run(tmp_path, killed_after(reads))
    kept = written(tmp_path)
    fused = []
    fuse = grown_tensors.fuse_blocks

    def counted(*parents, **options):
        fused.append(parents)
        return fuse(*parents, **options)

    monkeypatch.setattr(grown_tensors, "fuse_blocks", counted)
    said = []
    made = run(tmp_path, source_of(CONFIG, tensors_of()), say=said.append)
    expected, whole = uninterrupted
    assert content(tmp_path) == expected
    assert (made.manifest, made.reports) == (whole.manifest, whole.reports)
    assert len(said) == (kept > 0)
    # A new layer is only made again where one of its 9 tensors is missing; the embedding is first.
    missing = [depth for depth in (3, 5, 7) if 1 + 9 * (depth + 1) > kept]
    assert len(fused) == len(missing)


def test_a_damaged_tensor_and_those_after_it_in_its_file_are_made_again(tmp_path, uninterrupted):
    with pytest.raises(Killed):
        run(tmp_path, killed_after(100))
    kept = written(tmp_path)
    shard = sorted((tmp_path / "grown.partial").glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    said = []
    run(tmp_path, source_of(CONFIG, tensors_of()), say=said.append)
    assert content(tmp_path) == uninterrupted[0]
    # It is the last of the second file; those of the third are kept.
    assert said[0].endswith(f"{kept - 1} of 83 tensors are written, and kept")


@pytest.mark.parametrize("cut", [1, 40])
def test_a_line_that_was_cut_short_does_not_count(tmp_path, uninterrupted, cut):
    with pytest.raises(Killed):
        run(tmp_path, killed_after(60))
    path = max((tmp_path / "grown.partial").glob(f"*.{journal.FILE_NAME}"))
    path.write_bytes(path.read_bytes()[:-cut])
    run(tmp_path, source_of(CONFIG, tensors_of()))
    assert content(tmp_path) == uninterrupted[0]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"epsilon": 0.05}, "upscale.epsilon"),
        ({"method": "copy_next"}, "upscale.method"),
        ({"max_shard_bytes": 40_000}, "max_shard_bytes"),
    ],
)
def test_what_was_begun_with_other_settings_is_made_anew(tmp_path, fields, named):
    with pytest.raises(Killed):
        run(tmp_path / "killed", killed_after(60))
    said = []
    source = source_of(CONFIG, tensors_of())
    run(tmp_path / "killed", source, say=said.append, **fields)
    run(tmp_path / "whole", source, **fields)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert said == [
        f"{tmp_path / 'killed' / 'grown.partial'}: was begun with another {named}; it is made anew"
    ]


def test_what_was_begun_from_another_base_is_made_anew(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path / "killed", killed_after(60))
    said = []
    other = source_of(CONFIG, tensors_of(1))
    run(tmp_path / "killed", other, say=said.append)
    run(tmp_path / "whole", other)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert "some/base: tensor model.embed_tokens.weight has changed" in said[0]


def test_two_processes_do_not_write_one_folder(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, killed_after(60))
    path = tmp_path / "grown.partial" / journal.FILE_NAME
    before = path.read_bytes()
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="grown.partial: another process is writing it"):
            run(tmp_path, source_of(CONFIG, tensors_of()))
    assert path.read_bytes() == before


def test_a_finished_folder_does_not_keep_its_journal(tmp_path, uninterrupted):
    # A kill between the renaming of the folder and the removal of the journal.
    run(tmp_path, source_of(CONFIG, tensors_of()))
    (tmp_path / "grown" / journal.FILE_NAME).write_text(json.dumps({}))
    assert journal.is_finished(tmp_path / "grown")
    assert content(tmp_path) == uninterrupted[0]


def test_a_refused_expansion_leaves_nothing(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, killed_after(60))
    tensors = dict(tensors_of())
    name = "model.layers.5.mlp.gate_proj.weight"
    tensors[name] = np.full_like(tensors[name], np.nan)
    with pytest.raises(UserError, match="layers.5.* holds NaN"):
        run(tmp_path, source_of(CONFIG, tensors))
    assert list(tmp_path.iterdir()) == []
