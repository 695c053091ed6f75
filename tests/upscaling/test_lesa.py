"""LESA from a base to a grown checkpoint."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch

from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.config import UpscaleConfig, validate
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import ParamSpec, block_specs
from opt_deus_jax.upscaling import lesa
from opt_deus_jax.upscaling.expand import expand_checkpoint
from opt_deus_jax.upscaling.fusion import fuse_blocks
from opt_deus_jax.upscaling.lesa import MATRICES, check_predictable, learn_matrix, predict_matrix
from tests.families import base as family_base
from tests.llama_checkpoints import (
    hf_config,
    load_directory,
    oracle_logits,
    oracle_model,
    random_tensors,
    source_of,
    tokens,
)

# Kernels of one shape, so that little is compiled.
CONFIG = hf_config(intermediate_size=32, num_key_value_heads=4)


@functools.cache
def tiny_base():
    return source_of(CONFIG, random_tensors(CONFIG))


def expand(directory, source=None, **fields):
    upscale = UpscaleConfig(method="lesa", **fields)
    validate(upscale, "upscale.")
    source = source or tiny_base()
    return expand_checkpoint(
        source, upscale, directory, probe_BT=tokens(vocabulary=64), max_shard_bytes=10**9
    )


def block_of(source, layer):
    specs = block_specs(read_model_config(source.hf_config))
    return {name: source.read(spec.hf_name.format(layer=layer)) for name, spec in specs.items()}


def kernels_of(name):
    hf_name = block_specs(read_model_config(CONFIG))[f"{name}_kernel"].hf_name
    return lambda layer: tiny_base().read(hf_name.format(layer=layer))


def predicted_by_torch(name, below, above, seed=0):
    """U S MLP([V_A, V_B]) from NumPy's decomposition of the whole and torch's layers."""
    read = kernels_of(name)
    learned = learn_matrix(read, 6, name=name, seed=seed)
    whole = np.concatenate([read(layer) for layer in range(6)], axis=1).astype(np.float64)
    u, s, v = np.linalg.svd(whole, full_matrices=False)
    signs = np.sign(u[np.abs(u).argmax(axis=0), np.arange(len(s))])
    u, parts = u * signs, np.split((v * signs[:, None]).astype(np.float32), 6, axis=1)
    x = torch.from_numpy(np.concatenate([parts[below], parts[above]], axis=1))
    for part in ("first", "second", "third"):
        kernel, bias = (
            torch.from_numpy(np.array(learned.params[f"{part}_{k}"])) for k in ("kernel", "bias")
        )
        x = torch.nn.functional.linear(x, kernel, bias)
        x = x if part == "third" else torch.relu(x)
    return (u * s) @ x.double().numpy()


@pytest.mark.parametrize(
    ("fields", "gaps"),
    [
        ({"num_new_layers": 2}, {4: (3, 4), 6: (4, 5)}),
        # The last layer of `uniform` has none above; A stands for both, as in other methods.
        ({"layout": "uniform", "num_new_layers": 2}, {3: (2, 3), 7: (5, 5)}),
    ],
)
def test_new_layers_are_what_was_predicted_between_their_parents(tmp_path, fields, gaps):
    made = expand(tmp_path / "grown", **fields)
    grown = open_checkpoint(str(tmp_path / "grown"))
    new = {line["depth"] for line in made.manifest.layers if line["is_new"]}
    assert new == set(gaps)
    for depth, (below, above) in gaps.items():
        block, a, b = (
            block_of(grown, depth),
            block_of(tiny_base(), below),
            block_of(tiny_base(), above),
        )
        for name in ("query", "down"):
            expected = predicted_by_torch(name, below, above)
            assert np.abs(expected).max() > 0.01
            np.testing.assert_allclose(block[f"{name}_kernel"], expected, atol=1e-5)
        for name in ("input_norm", "post_attention_norm"):
            np.testing.assert_array_equal(block[name], (a[name] + b[name]) / 2)
    assert not made.identity.bit_identical
    assert made.manifest.options["lesa_norms"] == "mean"
    learned = {line["name"]: line for line in made.manifest.diagnostics}
    assert tuple(learned) == MATRICES
    assert [dataclasses.asdict(report) for report in made.predictors] == [*learned.values()]
    assert learned["gate"]["samples"] == 4 * 32
    assert 0 < learned["gate"]["loss"] != learned["gate"]["mean_loss"] > 0


def test_the_first_layers_norms_stay_in_new_layers_where_the_reference_leaves_them(tmp_path):
    expand(tmp_path / "grown", num_new_layers=1, lesa_norms="reference")
    expand(tmp_path / "mean", num_new_layers=1)
    grown, mean = (block_of(open_checkpoint(str(tmp_path / name)), 5) for name in ("grown", "mean"))
    first = block_of(tiny_base(), 0)
    for name in grown:
        if name.endswith("_norm"):
            np.testing.assert_array_equal(grown[name], first[name])
        else:
            np.testing.assert_array_equal(grown[name], mean[name])


def test_zeroed_ends_make_it_the_identity_and_leave_the_rest_alone(tmp_path):
    zeroed = expand(tmp_path / "zeroed", num_new_layers=2, zero_init=True)
    expand(tmp_path / "grown", num_new_layers=2)
    assert zeroed.identity.bit_identical
    # What would be thrown away is not learned.
    assert {report.name for report in zeroed.predictors} == {*MATRICES} - {"output", "down"}
    blocks = [block_of(open_checkpoint(str(tmp_path / d)), 6) for d in ("zeroed", "grown")]
    for name, array in blocks[0].items():
        if name in ("output_kernel", "down_kernel"):
            assert not array.any()
            assert blocks[1][name].any()
        else:
            np.testing.assert_array_equal(array, blocks[1][name])
    zeroed_logits = oracle_logits(load_directory(tmp_path / "zeroed"), tokens())
    base_logits = oracle_logits(oracle_model(CONFIG, random_tensors(CONFIG)), tokens())
    np.testing.assert_allclose(zeroed_logits, base_logits, rtol=0, atol=1e-5)


def test_the_same_seed_gives_the_same_bytes_and_another_another(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        expand(tmp_path / name, num_new_layers=1, seed=seed)
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b != c


def test_a_layer_left_out_is_not_seen():
    draw = np.random.default_rng(0).standard_normal((7, 32, 32)).astype(np.float32)
    changed = draw.copy()
    changed[3] = 1e3
    first, second = (
        learn_matrix(kernels.__getitem__, 7, name="query", seed=0, left_out=3)
        for kernels in (draw, changed)
    )
    # (0, 1, 2) and (4, 5, 6) do not touch it.
    assert first.report.samples == 2 * 32
    assert first.report == second.report
    np.testing.assert_array_equal(
        predict_matrix(first, draw[2], draw[4]), predict_matrix(second, draw[2], draw[4])
    )
    with pytest.raises(UserError, match="without layer 1 no three consecutive layers of 4"):
        learn_matrix(draw.__getitem__, 4, name="query", seed=0, left_out=1)


def test_matrices_of_one_shape_get_networks_of_their_own():
    query, key = (
        learn_matrix(kernels_of("query"), 6, name=name, seed=0).params for name in ("query", "key")
    )
    assert not np.array_equal(query["second_kernel"], key["second_kernel"])


@pytest.mark.parametrize("variant", ["qwen3", "gemma2"])
def test_biases_and_extra_norms_are_the_parents_mean(tmp_path, variant):
    source = family_base(variant)
    expand(tmp_path / "grown", source, num_new_layers=1)
    block = block_of(open_checkpoint(str(tmp_path / "grown")), 3)
    a, b = block_of(source, 2), block_of(source, 3)
    vectors = [name for name, array in block.items() if array.ndim == 1]
    assert len(vectors) > 3
    for name in vectors:
        np.testing.assert_allclose(block[name], (a[name] + b[name]) / 2, rtol=1e-6)
    zeroed = expand(tmp_path / "zeroed", source, num_new_layers=1, zero_init=True)
    assert zeroed.identity.bit_identical


def test_what_cannot_be_learned_from_is_refused_before_anything_is_written(tmp_path):
    specs = block_specs(read_model_config(CONFIG))
    check_predictable(specs, 3)
    with pytest.raises(UserError, match="learns from layers between two others, this base has 2"):
        check_predictable(specs, 2)
    router = ParamSpec((4, 32), ("experts", "width"), "router", "normal")
    with pytest.raises(UserError, match="also has router_kernel .a mixture of experts"):
        check_predictable({**specs, "router_kernel": router}, 3)
    small = hf_config(num_hidden_layers=2)
    with pytest.raises(UserError, match="method='lesa'.*this base has 2 layers"):
        expand(tmp_path / "grown", source_of(small, random_tensors(small)), num_new_layers=1)
    zeros = {name: x * ("v_proj" not in name) for name, x in random_tensors(CONFIG).items()}
    with pytest.raises(UserError, match="the value kernels of all layers are zero"):
        expand(tmp_path / "grown", source_of(CONFIG, zeros), num_new_layers=1)
    with pytest.raises(UserError, match="upscale.lesa_norms='median': use one of mean, reference"):
        expand(tmp_path / "grown", num_new_layers=1, lesa_norms="median")
    assert not (tmp_path / "grown").exists()


def test_a_full_disk_ends_in_one_line(monkeypatch, tmp_path):
    def is_full(path, mode):
        return open("/dev/full", mode)  # noqa: SIM115

    monkeypatch.setattr(lesa.Path, "open", is_full)
    with pytest.raises(UserError, match="cannot hold the coordinates.*No space left.*set TMPDIR"):
        learn_matrix(kernels_of("query"), 6, name="query", seed=0)


def test_a_block_is_not_predicted_without_predictors():
    block = block_of(tiny_base(), 0)
    config = read_model_config(CONFIG)
    with pytest.raises(ValueError, match="weights='predicted'"):
        fuse_blocks(block, block, config=config, weights="predicted", zero_init=False)


def test_no_more_rows_than_a_part_are_gathered_at_once(monkeypatch):
    whole = learn_matrix(kernels_of("query"), 6, name="query", seed=0)
    monkeypatch.setattr("opt_deus_jax.upscaling.lesa_predictor._CHUNK_BYTES", 1)
    parts = learn_matrix(kernels_of("query"), 6, name="query", seed=0)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6), whole.params, parts.params
    )
    assert parts.report.loss == pytest.approx(whole.report.loss, rel=1e-4)
