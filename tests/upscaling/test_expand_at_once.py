"""Several gaps fused at once, a device each, end in the bytes of one after the other."""

import dataclasses
import functools

import jax
import pytest

from opt_deus_jax.checkpoints import journal
from opt_deus_jax.config import UpscaleConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.reporting.plots import plot_diagnostics
from opt_deus_jax.upscaling import expand, grown_tensors
from tests.llama_checkpoints import hf_config, random_tensors, source_of, tokens

CONFIG = hf_config(intermediate_size=32, num_key_value_heads=4, num_hidden_layers=8)


@functools.cache
def source(seed=0):
    return source_of(CONFIG, random_tensors(CONFIG, seed))


def run(directory, base, at_once, max_shard_bytes=30_000, say=lambda line: None, **fields):
    return expand.expand_checkpoint(
        base,
        UpscaleConfig(**{"method": "average", "num_new_layers": 5} | fields),
        directory / "grown",
        probe_BT=tokens(),
        max_shard_bytes=max_shard_bytes,
        devices=jax.devices()[:at_once],
        draw=plot_diagnostics,
        say=say,
    )


def content(directory):
    return {path.name: path.read_bytes() for path in (directory / "grown").iterdir()}


class Killed(BaseException):
    """Nothing in the library catches it."""


def killed_after(number):
    """A base of which only so many tensors can be read, by all threads together."""
    reads = []

    def read(name):
        reads.append(name)
        if len(reads) > number:
            raise Killed
        return source().read(name)

    return dataclasses.replace(source(), read=read)


@pytest.fixture(scope="module")
def one_at_a_time(tmp_path_factory):
    directory = tmp_path_factory.mktemp("one")
    made = run(directory, source(), 1)
    return content(directory), made


@pytest.mark.parametrize("max_shard_bytes", [30_000, 10**9])
def test_transport_on_three_devices_gives_the_same_bytes(tmp_path, max_shard_bytes):
    fields = {"method": "opt_deus", "num_new_layers": 4, "max_shard_bytes": max_shard_bytes}
    one = run(tmp_path / "one", source(), 1, **fields)
    many = run(tmp_path / "many", source(), 3, **fields)
    assert content(tmp_path / "many") == content(tmp_path / "one")
    assert (many.manifest, many.reports) == (one.manifest, one.reports)


@pytest.mark.parametrize(("reads", "begun_with", "resumed_with"), [
    (30, 3, 1), (70, 3, 8), (110, 8, 2), (90, 1, 4),
])  # fmt: skip
def test_a_killed_expansion_goes_on_with_another_number(
    tmp_path, one_at_a_time, reads, begun_with, resumed_with
):
    with pytest.raises(Killed):
        run(tmp_path, killed_after(reads), begun_with)
    written = journal.count_written(tmp_path / "grown.partial")
    said = []
    made = run(tmp_path, source(), resumed_with, say=said.append)
    assert content(tmp_path) == one_at_a_time[0]
    assert made.manifest == one_at_a_time[1].manifest
    assert said == [
        f"{tmp_path}/grown.partial: {written} of 119 tensors are written, and kept"
    ] * bool(written)


def test_journals_do_not_depend_on_what_was_made_ahead(tmp_path, monkeypatch):
    def stop(*_):
        raise Killed

    monkeypatch.setattr(expand, "write_index", stop)
    for at_once in (1, 4):
        with pytest.raises(Killed):
            run(tmp_path / str(at_once), source(), at_once)
    one, four = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "grown.partial").iterdir()}
        for name in ("1", "4")
    )
    assert len(one) > 10
    assert one == four


def test_a_changed_base_is_found_in_every_file_that_was_made_of_it(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, killed_after(110), 1)
    # Of layer 3 there is a copy, and it is a parent of the new layers below and above.
    tensors = random_tensors(CONFIG)
    tensors["model.layers.3.mlp.gate_proj.weight"] += 1
    other, said = source_of(CONFIG, tensors), []
    run(tmp_path, other, 2, say=said.append)
    run(tmp_path / "whole", other, 1)
    assert content(tmp_path) == content(tmp_path / "whole")
    assert "layers.3.mlp.gate_proj.weight has changed" in said[0]
    assert said[0].endswith(".safetensors is made anew")
    assert said[-1].endswith("tensors are written, and kept")


def test_a_gap_that_fails_ahead_is_refused_in_its_turn(tmp_path, monkeypatch):
    fuse = grown_tensors.fuse_blocks

    def broken(*parents, **options):
        fused = fuse(*parents, **options)
        if options["seed"] >= 7:
            fused.block["gate_kernel"][:] = float("nan")
        return fused

    monkeypatch.setattr(grown_tensors, "fuse_blocks", broken)
    # New layers are at depths 3, 5, 7 ...: that at 7 is the first.
    with pytest.raises(UserError, match="new layer 7: gate_kernel is not finite after fusion"):
        run(tmp_path, source(), 4)
    assert list(tmp_path.iterdir()) == []
