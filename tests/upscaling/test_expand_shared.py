"""Shares that are written one after the other, where fused kernels and experts straddle files."""

from collections.abc import Callable
from typing import Any

import pytest

from opt_deus_jax.config import UpscaleConfig
from opt_deus_jax.distributed.team import ALONE, Team
from opt_deus_jax.errors import ResumableError
from opt_deus_jax.reporting.plots import plot_diagnostics
from opt_deus_jax.upscaling.expand import expand_checkpoint
from tests.families import write
from tests.llama_checkpoints import tokens


class Ended(BaseException):
    """Where one of several processes would wait for the first."""


class OneOf(Team):
    """One of several processes, which waits for no other."""

    def run(self, work: Callable[[], Any]) -> Any:
        return work()

    def gather(self, value: Any) -> list[Any]:
        raise Ended

    def check(self) -> None:
        pass


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(("variant", "method"), [
    ("mixtral", "average"), ("qwen3_moe", "average"), ("phi3", "average"), ("phi3", "opt_deus"),
])  # fmt: skip
def test_files_of_several_shares_are_those_of_one(tmp_path, variant, method):
    source = write(variant, tmp_path / "base")

    def expand(name, team=ALONE, say=lambda line: None):
        return expand_checkpoint(
            source,
            UpscaleConfig(method=method, num_new_layers=2),
            tmp_path / name,
            probe_BT=tokens(length=12, vocabulary=64),
            # Less than a layer: those that are fused straddle shares.
            max_shard_bytes=10_000,
            team=team,
            draw=plot_diagnostics,
            say=say,
        )

    one = expand("one")
    # The first has begun the folder; it finds that the others' notes are missing.
    with pytest.raises(ResumableError, match="has notes of 0 of .* tensors"):
        expand("shared", OneOf(0, 3))
    for index in (2, 1):
        with pytest.raises((Ended, ResumableError)):
            expand("shared", OneOf(index, 3))
    said = []
    shared = expand("shared", say=said.append)
    assert content(tmp_path / "shared") == content(tmp_path / "one")
    assert (shared.manifest, shared.reports) == (one.manifest, one.reports)
    number, total = said[0].split(": ")[1].split(" tensors ")[0].split(" of ")
    assert number == total
