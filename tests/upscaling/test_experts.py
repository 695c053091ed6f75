"""New layers from layers with experts: which are matched, what follows them, what is refused."""

import functools

import numpy as np
import pytest

from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.config import UpscaleConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.params import block_specs, identity_values
from opt_deus_jax.reporting.plots import PICTURE, plot_diagnostics
from opt_deus_jax.upscaling import fusion
from opt_deus_jax.upscaling.expand import expand_checkpoint
from opt_deus_jax.upscaling.experts import EXPERT_PARAMETERS, match_experts
from opt_deus_jax.upscaling.fusion import fuse_blocks
from tests.families import load, oracle, write
from tests.llama_checkpoints import oracle_logits, tokens
from tests.upscaling.test_symmetric_families import blocks_of, shuffled_neurons

TRANSPORTS = ("reference", "barycentric", "assignment", "symmetric")


def permuted(block, order):
    """The same function with its experts in other places."""
    return {**block, **{name: block[name][order] for name in EXPERT_PARAMETERS}}


def expand(source, directory, **fields):
    return expand_checkpoint(
        source,
        UpscaleConfig(**fields),
        directory,
        probe_BT=tokens(length=12, vocabulary=64),
        max_shard_bytes=10**9,
    )


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_permuted_experts_are_found_again(variant, noise):
    config, blocks = blocks_of(variant)
    generator = np.random.default_rng(0)
    order = generator.permutation(len(blocks[0]["router_kernel"]))
    assert (order != np.arange(len(order))).any()
    copy = permuted(blocks[0], order)
    # Neither their neurons' order nor what training moved hides them.
    copy = shuffled_inside(copy, generator)
    for name in EXPERT_PARAMETERS:
        scale = noise * blocks[0][name].std()
        copy[name] = copy[name] + (scale * generator.standard_normal(copy[name].shape)).astype("f4")
    match = match_experts(blocks[0], copy, config)
    np.testing.assert_array_equal(match.source_E, order)
    assert match.matched_cost < (0.2 if noise else 1e-3) * match.mean_cost


def shuffled_inside(block, generator):
    block = dict(block)
    for expert in range(len(block["router_kernel"])):
        kernels = {n: block[f"experts_{n}_kernel"][expert] for n in ("gate", "up", "down")}
        moved = shuffled_neurons({f"{n}_kernel": k for n, k in kernels.items()}, generator)
        for n in kernels:
            stack = block[f"experts_{n}_kernel"].copy()
            stack[expert] = moved[f"{n}_kernel"]
            block[f"experts_{n}_kernel"] = stack
    return block


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe"])
def test_a_block_fused_with_its_permuted_copy_is_that_copy(variant):
    config, blocks = blocks_of(variant)
    copy = permuted(
        blocks[0], np.random.default_rng(0).permutation(len(blocks[0]["router_kernel"]))
    )
    options = {"config": config, "weights": "transport", "zero_init": False}
    for transport in ("assignment", "symmetric"):
        fused = fuse_blocks(blocks[0], copy, transport=transport, **options)
        for name, array in copy.items():
            np.testing.assert_allclose(fused.block[name], array, atol=1e-5, err_msg=name)
    # Without a match, experts that are not alike are mixed.
    averaged = fuse_blocks(blocks[0], copy, config=config, weights="average", zero_init=False)
    assert np.abs(averaged.block["router_kernel"] - copy["router_kernel"]).max() > 0.05


@pytest.mark.parametrize("fused_as", ["mean", "rescaled"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_router_goes_with_its_experts_and_is_not_transported(transport, fused_as):
    config, (a, b, *_) = blocks_of("mixtral")
    a = {**a, "post_attention_norm": b["post_attention_norm"]}
    options = {"config": config, "weights": "transport", "zero_init": True, "fusion": fused_as}
    made = fuse_blocks(a, b, transport=transport, **options)
    assert made.block.keys() == block_specs(config).keys()
    router_a, router_b = a["router_kernel"], b["router_kernel"]
    expected = (router_a[match_experts(a, b, config).source_E] + router_b) / 2
    norm = np.abs(b["post_attention_norm"])
    weight = norm if transport == "symmetric" else np.ones_like(norm)
    if fused_as == "rescaled":
        wanted, found = (np.linalg.norm(rows * weight, axis=1) for rows in (router_b, expected))
        expected = expected * (wanted / found)[:, None]
    np.testing.assert_allclose(made.block["router_kernel"], expected, rtol=1e-4, atol=1e-6)
    names = [report.name for report in made.reports]
    assert names.count("router") == 1
    moved = made.maps["router"].T @ router_a
    np.testing.assert_array_equal(moved, router_a[match_experts(a, b, config).source_E])
    assert {"experts gate", "experts up"} <= set(names)
    assert all(report.converged for report in made.reports)


def test_every_pair_of_experts_is_fused_like_an_mlp():
    config, (a, b, *_) = blocks_of("mixtral")
    made = fuse_blocks(a, b, config=config, weights="transport", zero_init=False)
    source_E = match_experts(a, b, config).source_E
    attention = {name: a[name] for name in a if name not in EXPERT_PARAMETERS}

    def dense(block, expert):
        kernels = {f"{n}_kernel": block[f"experts_{n}_kernel"][expert] for n in MLP}
        return {**attention, **{n: block[n] for n in attention}, **kernels}

    for target, source in enumerate(source_E):
        pair = dense(a, source), dense(b, target)
        alone = fuse_blocks(*pair, config=config, weights="transport", zero_init=False).block
        for name in MLP:
            found = made.block[f"experts_{name}_kernel"][target]
            np.testing.assert_allclose(found, alone[f"{name}_kernel"], atol=1e-5, err_msg=name)


MLP = ("gate", "up", "down")


@pytest.mark.parametrize(
    ("fields", "is_identity"),
    [
        *(({"method": "opt_deus", "transport": name}, True) for name in TRANSPORTS),
        ({"method": "opt_deus", "transport": "symmetric", "fusion": "select"}, True),
        ({"method": "random"}, True),
        ({"method": "half_next"}, True),
        ({"method": "average"}, False),
        ({"method": "solar"}, False),
    ],
)
def test_methods_make_what_transformers_loads(tmp_path, fields, is_identity):
    made = expand(
        write("mixtral", tmp_path / "base"), tmp_path / "grown", num_new_layers=1, **fields
    )
    assert made.identity.bit_identical == is_identity
    tokens_BT = tokens(length=20, vocabulary=64)
    logits, base_logits = (
        oracle_logits(model, tokens_BT) for model in (load(tmp_path / "grown"), oracle("mixtral"))
    )
    difference = np.abs(logits - base_logits).max()
    assert difference < 1e-5 if is_identity else difference > 0.1
    grown = open_checkpoint(str(tmp_path / "grown"))
    down = grown.read("model.layers.3.block_sparse_moe.experts.*.w2.weight")
    if is_identity:
        assert not down.any()
        assert not grown.read("model.layers.3.self_attn.o_proj.weight").any()


def test_experts_that_are_not_zeroed_are_caught(tmp_path, monkeypatch):
    def forgetful(config):
        values = identity_values(config)
        return {name: value for name, value in values.items() if not name.startswith("experts")}

    monkeypatch.setattr(fusion, "identity_values", forgetful)
    with pytest.raises(UserError, match="the grown model is not its base"):
        expand(write("mixtral", tmp_path / "base"), tmp_path / "grown", num_new_layers=1)
    assert not (tmp_path / "grown").exists()


@pytest.mark.parametrize("expert", range(4))
def test_one_expert_that_is_not_zeroed_is_caught_though_no_token_is_sent_to_it(
    tmp_path, monkeypatch, expert
):
    end = fusion._end_branches

    def careless(block, config, zero_init, output_scale):
        block = end(block, config, zero_init, output_scale)
        block["experts_down_kernel"][expert, 5, 7] = 0.1
        return block

    monkeypatch.setattr(fusion, "_end_branches", careless)
    # One token is sent to two of the four.
    with pytest.raises(UserError, match="the grown model is not its base"):
        expand_checkpoint(
            write("mixtral", tmp_path / "base"),
            UpscaleConfig(num_new_layers=1),
            tmp_path / "grown",
            probe_BT=tokens(rows=1, length=1, vocabulary=64),
            max_shard_bytes=10**9,
        )


def test_layers_with_and_without_experts_are_not_mixed(tmp_path):
    source = write("qwen3_moe", tmp_path / "base")
    message = "layer 1 would mix base layers 0 and 1, of which only one has experts"
    for method in ("opt_deus", "average"):
        with pytest.raises(UserError, match=message):
            expand(source, tmp_path / "grown", method=method, layout="bottom", num_new_layers=2)
    expand_at = functools.partial(expand, source, layout="explicit", gaps=(0,))
    for method, dense in (("copy_previous", [0, 1]), ("copy_next", [0]), ("random", [0])):
        made = expand_at(tmp_path / method, method=method)
        assert made.identity.bit_identical
        model = load(tmp_path / method)
        assert model.config.mlp_only_layers == dense
        tokens_BT = tokens(length=20, vocabulary=64)
        expected = oracle_logits(oracle("qwen3_moe"), tokens_BT)
        np.testing.assert_allclose(oracle_logits(model, tokens_BT), expected, rtol=0, atol=1e-5)


def test_layers_with_experts_and_others_are_drawn_in_one_picture(tmp_path):
    config, (a, b, *_) = blocks_of("mixtral")
    options = {"weights": "transport", "transport": "assignment", "zero_init": True}
    made = fuse_blocks(a, b, config=config, **options)
    plain_config, (plain_a, plain_b, *_) = blocks_of("llama")
    plain = fuse_blocks(plain_a, plain_b, config=plain_config, **options)
    for lowest, other in ((made, plain), (plain, made)):
        plot_diagnostics(tmp_path, lowest.pictures, {2: lowest.reports, 4: other.reports})
        assert (tmp_path / PICTURE).stat().st_size > 10_000
        (tmp_path / PICTURE).unlink()
