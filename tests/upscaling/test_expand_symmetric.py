"""Expansion by symmetric transport: what it promises."""

import numpy as np
import pytest

from opt_deus_jax.config import UpscaleConfig
from opt_deus_jax.reporting.plots import PICTURE, plot_diagnostics
from opt_deus_jax.upscaling.blending import FUSIONS
from opt_deus_jax.upscaling.expand import expand_checkpoint
from tests.llama_checkpoints import (
    hf_config,
    load_directory,
    oracle_logits,
    random_tensors,
    source_of,
    tokens,
    write_directory,
)

CONFIG = hf_config(intermediate_size=32, num_key_value_heads=4)


@pytest.fixture(scope="module")
def base():
    return source_of(CONFIG, random_tensors(CONFIG))


@pytest.fixture(scope="module")
def base_logits(tmp_path_factory):
    directory = write_directory(
        tmp_path_factory.mktemp("base") / "base", CONFIG, random_tensors(CONFIG)
    )
    return oracle_logits(load_directory(directory), tokens())


def expand(source, directory, draw=None, **fields):
    options = {} if draw is None else {"draw": draw}
    return expand_checkpoint(
        source,
        UpscaleConfig(**fields),
        directory,
        probe_BT=tokens(),
        max_shard_bytes=10**9,
        **options,
    )


@pytest.mark.parametrize("fusion", FUSIONS)
def test_symmetric_fusion_from_a_config_to_a_picture(tmp_path, base, base_logits, fusion):
    fields = {"transport": "symmetric", "fusion": fusion, "num_new_layers": 2}
    made = expand(base, tmp_path / "grown", draw=plot_diagnostics, **fields)
    assert made.identity.bit_identical
    logits = oracle_logits(load_directory(tmp_path / "grown"), tokens())
    np.testing.assert_allclose(logits, base_logits, rtol=0, atol=1e-5)
    assert (tmp_path / "grown" / PICTURE).read_bytes().startswith(b"\x89PNG")
    gains = {d["name"]: d["match_gain"] for d in made.manifest.diagnostics if d["depth"] == 4}
    assert gains.keys() >= {"heads", "neurons", "query", "up", "down"}
    assert all(0 < gain < 1 for gain in gains.values())
