"""Fusion against the method, written again in float64 with POT and SciPy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import ot
import pytest
from scipy import optimize
from scipy.spatial import distance

from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import block_specs
from opt_deus_jax.transport import plan, wide
from opt_deus_jax.upscaling import alignment, fusion
from tests.llama_checkpoints import hf_config, smollm2

EPSILON = 0.06
ZEROED = ("output_kernel", "down_kernel", "output_bias", "down_bias")


def random_block(config, seed, sigma):
    generator = np.random.default_rng(seed)
    return {
        name: (sigma * generator.standard_normal(spec.shape) + (spec.init == "ones")).astype(
            np.float32
        )
        for name, spec in block_specs(config).items()
    }


def in_float64(block):
    return {name: array.astype(np.float64) for name, array in block.items()}


def log_plan(a, b):
    cost = distance.cdist(a, b)
    uniform_a, uniform_b = ot.unif(len(a)), ot.unif(len(b))
    return np.asarray(ot.bregman.sinkhorn_log(uniform_a, uniform_b, cost, EPSILON, 20_000, 1e-10))


def scaling_plan(a, b):
    # In float64 exp(-20 / 0.06) = 1e-145 does not underflow, and an iteration is ten times faster.
    cost = distance.cdist(a, b)
    uniform_a, uniform_b = ot.unif(len(a)), ot.unif(len(b))
    assert cost.max() < 25
    plan = ot.bregman.sinkhorn_knopp(uniform_a, uniform_b, cost, EPSILON, 30_000, 1e-8)
    return np.asarray(plan)


def exact_map(a, b):
    rows, columns = optimize.linear_sum_assignment(distance.cdist(a, b))
    permutation = np.zeros((len(a), len(b)))
    permutation[rows, columns] = 1
    return permutation


def fuse_in_float64(a, b, map_of):
    """The authors' flow; also the part of each fused matrix that comes from A."""
    a, b = in_float64(a), in_float64(b)
    fused = {"input_norm": (a["input_norm"] + b["input_norm"]) / 2}
    moved = {}

    def fuse(name, kernel):
        map_ = map_of(kernel, b[f"{name}_kernel"])
        moved[name] = map_.T @ kernel
        fused[f"{name}_kernel"] = (moved[name] + b[f"{name}_kernel"]) / 2
        if f"{name}_bias" in a:
            fused[f"{name}_bias"] = (map_.T @ a[f"{name}_bias"] + b[f"{name}_bias"]) / 2
        return map_

    for name in ("query", "key", "value"):
        fuse(name, a[f"{name}_kernel"])
    output_map = fuse("output", a["output_kernel"])
    t_in = output_map / 2 + np.eye(len(output_map)) / 2
    norm = "post_attention_norm"
    fused[norm] = (a[norm] @ t_in + b[norm]) / 2
    for name in ("gate", "up"):
        fuse(name, a[f"{name}_kernel"] @ output_map)
    fuse("down", a["down_kernel"])
    return fused, moved


def relative_error(value, expected):
    return np.linalg.norm(value - expected) / np.linalg.norm(expected)


def assert_fused_equal(ours, expected, moved, a, names):
    assert set(names) <= expected.keys()
    for name in names:
        assert ours.block[name].dtype == np.float32
        assert relative_error(ours.block[name], expected[name]) < 1e-4, name
    # With the coupling unscaled, A's share of a fused kernel is about 1/rows of it: it is compared
    # on its own, or a plan of zeros would pass.
    output_map = ours.maps["output"].astype(np.float64)
    for name, map_ in ours.maps.items():
        kernel = a[f"{name}_kernel"].astype(np.float64)
        kernel = kernel @ output_map if name in ("gate", "up") else kernel
        assert relative_error(map_.T.astype(np.float64) @ kernel, moved[name]) < 1e-4, name


def config_of(**changes):
    return read_model_config(hf_config(**changes))


def square(width):
    """All kernels of one shape: each shape takes seconds to compile."""
    sizes = {"hidden_size": width, "intermediate_size": width}
    return config_of(**sizes, num_attention_heads=4, num_key_value_heads=4)


@pytest.mark.parametrize("sigma", [0.02, 0.3])
def test_reference_equals_pot_for_every_tensor_of_a_block_with_biases(sigma):
    config = config_of(attention_bias=True, mlp_bias=True, intermediate_size=16)
    a, b = random_block(config, 0, sigma), random_block(config, 1, sigma)
    ours = fusion.fuse_blocks(
        a, b, config=config, weights="transport", zero_init=False, transport="reference"
    )
    expected, moved = fuse_in_float64(a, b, log_plan)
    assert ours.block.keys() == expected.keys() == block_specs(config).keys()
    assert ours.maps.keys() == moved.keys()
    assert_fused_equal(ours, expected, moved, a, expected)
    assert [report.name for report in ours.reports] == list(moved)
    assert all(report.converged for report in ours.reports)


def test_reference_equals_pot_on_llama_sized_weights():
    # Rows as long as Llama's, where distances are near 1.3 and the plan is far from a permutation.
    config = square(1024)
    a, b = random_block(config, 0, 0.02), random_block(config, 1, 0.02)
    ours = fusion.fuse_blocks(
        a, b, config=config, weights="transport", zero_init=True, transport="reference"
    )
    # Down is zeroed, so its plan is not asked for.
    small = {name: (array[:8] if "down" in name else array) for name, array in a.items()}
    expected, moved = fuse_in_float64(
        small, b | {"down_kernel": b["down_kernel"][:8]}, scaling_plan
    )
    assert_fused_equal(ours, expected, moved, a, expected.keys() - set(ZEROED))
    assert ours.maps["gate"].shape == ours.maps["output"].shape == (1024, 1024)
    assert not np.any(ours.block["output_kernel"])
    assert ours.block["down_kernel"].shape == (1024, 1024)


@pytest.mark.parametrize("gap", [14, 18, 21])
def test_reference_equals_pot_on_smollm2(gap):
    source = smollm2()
    config = read_model_config(source.hf_config)
    a, b = (
        {
            name: source.read(spec.hf_name.format(layer=layer)).astype(np.float32)
            for name, spec in block_specs(config).items()
        }
        for layer in (gap, gap + 1)
    )
    ours = fusion.fuse_blocks(
        a, b, config=config, weights="transport", zero_init=True, transport="reference"
    )
    assert "down" not in ours.maps
    small = {name: (array[:8] if "down" in name else array) for name, array in a.items()}
    expected, moved = fuse_in_float64(
        small, b | {"down_kernel": b["down_kernel"][:8]}, scaling_plan
    )
    assert_fused_equal(ours, expected, moved, a, expected.keys() - set(ZEROED))
    assert all(report.converged for report in ours.reports)
    if gap == 14:
        keys = in_float64(a)["key_kernel"]
        plan = log_plan(keys, in_float64(b)["key_kernel"])
        assert relative_error(plan.T @ keys, moved["key"]) < 1e-4


def test_assignment_equals_scipy_for_every_tensor():
    config = config_of(intermediate_size=16)
    a, b = random_block(config, 0, 0.3), random_block(config, 1, 0.3)
    ours = fusion.fuse_blocks(
        a, b, config=config, weights="transport", zero_init=False, transport="assignment"
    )
    expected, moved = fuse_in_float64(a, b, exact_map)
    assert_fused_equal(ours, expected, moved, a, expected)
    gate = np.asarray(ours.maps["gate"])
    assert not np.array_equal(gate, np.eye(len(gate)))
    assert all(report.effective_sources == 1 for report in ours.reports)


@pytest.mark.parametrize("transport", ["barycentric", "assignment"])
def test_a_permuted_layer_is_found_again(transport):
    config = square(32)
    generator = np.random.default_rng(2)
    a = random_block(config, 0, 0.3)
    for name, kernel in a.items():
        if not name.endswith("_kernel"):
            continue
        order = generator.permutation(len(kernel))
        aligned = alignment.align(
            jnp.asarray(kernel), jnp.asarray(kernel[order]), transport=transport, epsilon=0.01
        )
        assert relative_error(np.asarray(aligned.fused_ND), kernel[order]) < 1e-3
        assert (np.asarray(aligned.map_MN).argmax(0) == order).all()


def test_a_transport_of_whole_blocks_is_not_taken_for_one_of_a_kernel():
    kernel = jnp.eye(4)
    with pytest.raises(ValueError, match="transport='symmetric' does not move"):
        alignment.align(kernel, kernel, transport="symmetric", epsilon=0.01)


def test_barycentric_is_relative_to_the_size_of_the_weights_and_reference_is_not():
    config = square(32)
    a, b = random_block(config, 0, 0.3), random_block(config, 1, 0.3)
    # A power of two keeps float32's digits, so relative transport gives the very same plan.
    small_a, small_b = ({k: v / 16 for k, v in block.items()} for block in (a, b))

    def plan(transport, previous, next_):
        kernels = (jnp.asarray(block["query_kernel"]) for block in (previous, next_))
        epsilon = fusion.transport_epsilon(transport, None)
        aligned = alignment.align(*kernels, transport=transport, epsilon=epsilon)
        return np.asarray(aligned.map_MN)

    barycentric = plan("barycentric", a, b)
    np.testing.assert_allclose(barycentric, plan("barycentric", small_a, small_b), atol=1e-5)
    np.testing.assert_allclose(barycentric.sum(0), 1.0, rtol=1e-4)
    reference = plan("reference", a, b)
    np.testing.assert_allclose(reference.sum(), 1.0, rtol=1e-4)
    assert np.abs(reference - plan("reference", small_a, small_b)).max() > 0.2 / len(reference)


def test_a_given_epsilon_is_used():
    config = square(32)
    a, b = random_block(config, 0, 0.3), random_block(config, 1, 0.3)

    def sources(epsilon):
        fused = fusion.fuse_blocks(
            a, b, config=config, weights="transport", zero_init=True, epsilon=epsilon
        )
        return fused.reports[0].effective_sources

    assert sources(None) == sources(0.01)
    assert sources(0.01) < sources(1.0) <= 32 * (1 + 1e-5)


def simple(weights, a, b, config, **options):
    fused = fusion.fuse_blocks(a, b, config=config, weights=weights, zero_init=False, **options)
    assert fused.reports == ()
    assert fused.block.keys() == block_specs(config).keys()
    return fused.block


def test_the_simple_ways_give_exactly_what_they_say():
    config = config_of(attention_bias=True, mlp_bias=True)
    a, b = random_block(config, 0, 0.1), random_block(config, 1, 0.1)
    expected = {
        "average": {name: (a[name] + b[name]) / np.float32(2) for name in a},
        "copy_previous": a,
        "copy_next": b,
        "half_next": {k: v if k.endswith("norm") else v * np.float32(0.5) for k, v in b.items()},
    }
    for weights, block in expected.items():
        made = simple(weights, a, b, config)
        for name in block:
            np.testing.assert_array_equal(made[name], block[name], strict=True)


def test_random_is_normal_with_deviation_002_and_of_its_seed():
    config = config_of(hidden_size=64, intermediate_size=512, mlp_bias=True, initializer_range=1.0)
    a, b = random_block(config, 0, 0.1), random_block(config, 1, 0.1)
    block = simple("random", a, b, config, seed=5)
    gate = block["gate_kernel"]
    assert gate.dtype == np.float32
    assert abs(gate.std() / 0.02 - 1) < 0.02
    assert abs(gate.mean()) < 0.02 * 4 / np.sqrt(gate.size)
    assert abs(np.mean(gate**4) / np.mean(gate**2) ** 2 - 3) < 0.2
    assert (block["input_norm"] == 1).all()
    assert (block["post_attention_norm"] == 1).all()
    assert not block["down_bias"].any()
    again, other = (simple("random", a, b, config, seed=seed) for seed in (5, 6))
    np.testing.assert_array_equal(again["gate_kernel"], gate)
    assert abs(np.corrcoef(other["gate_kernel"].ravel(), gate.ravel())[0, 1]) < 0.03


@pytest.mark.parametrize(
    "weights", ["transport", "average", "copy_previous", "copy_next", "half_next", "random"]
)
def test_zero_init_zeroes_both_outputs_and_leaves_the_rest_and_the_parents(weights):
    config = dataclasses.replace(square(32), qkv_bias=True, output_bias=True, mlp_bias=True)
    a, b = random_block(config, 0, 0.1), random_block(config, 1, 0.1)
    kept = {name: array.copy() for name, array in (a | b).items()}
    full, zeroed = (
        fusion.fuse_blocks(a, b, config=config, weights=weights, zero_init=zero_init).block
        for zero_init in (False, True)
    )
    for name, spec in block_specs(config).items():
        expected = np.zeros(spec.shape, np.float32) if name in ZEROED else full[name]
        np.testing.assert_array_equal(zeroed[name], expected, strict=True)
        np.testing.assert_array_equal(b[name], kept[name])
    assert full["down_kernel"].any()


def test_an_unknown_way_is_refused():
    block = random_block(config_of(), 0, 0.1)
    with pytest.raises(ValueError, match="weights='mean'"):
        fusion.fuse_blocks(block, block, config=config_of(), weights="mean", zero_init=True)


@pytest.mark.parametrize("weights", ["transport", "average"])
def test_rescaled_kernels_have_the_row_norms_of_the_next_layer(weights):
    config = square(32)
    a, b = random_block(config, 0, 0.3), random_block(config, 1, 0.3)

    def kernels(fusion_):
        options = {"weights": weights, "zero_init": False, "fusion": fusion_}
        block = fusion.fuse_blocks(a, b, config=config, **options).block
        return {name: array for name, array in block.items() if name.endswith("_kernel")}

    means = kernels("mean")
    for name, rescaled in kernels("rescaled").items():
        mean = means[name]
        wanted, norms = (np.linalg.norm(rows, axis=1) for rows in (b[name], rescaled))
        np.testing.assert_allclose(norms, wanted, rtol=1e-5)
        assert np.linalg.norm(mean) < 0.9 * np.linalg.norm(wanted)
        cosines = (mean * rescaled).sum(axis=1) / np.linalg.norm(mean, axis=1) / norms
        np.testing.assert_allclose(cosines, 1, rtol=1e-5)


@pytest.mark.parametrize("weights", ["transport", "copy_next", "average"])
def test_output_scale_multiplies_what_ends_the_branches_and_nothing_else(weights):
    config = config_of(
        intermediate_size=32, num_key_value_heads=4, attention_bias=True, mlp_bias=True
    )
    a, b = random_block(config, 0, 0.1), random_block(config, 1, 0.1)
    kept = b["down_kernel"].copy()

    def made(scale):
        options = {"weights": weights, "zero_init": False, "output_scale": scale}
        return fusion.fuse_blocks(a, b, config=config, **options).block

    full, scaled = made(1.0), made(0.125)
    for name, array in full.items():
        factor = np.float32(0.125 if name in ZEROED else 1)
        np.testing.assert_array_equal(scaled[name], factor * array, strict=True)
    np.testing.assert_array_equal(b["down_kernel"], kept)


@pytest.mark.parametrize("transport", ["barycentric", "reference"])
def test_plans_beyond_the_budget_give_the_same_block(monkeypatch, transport):
    config = config_of(attention_bias=True, mlp_bias=True)
    a, b = random_block(config, 0, 0.3), random_block(config, 1, 0.3)
    settings = {"config": config, "weights": "transport", "zero_init": False}
    expected = fusion.fuse_blocks(a, b, transport=transport, **settings)
    monkeypatch.setattr(plan, "LARGEST_PLAN_BYTES", 4 * 32 * 32)
    monkeypatch.setattr(wide, "_ROWS_AT_ONCE", 16)
    made = fusion.fuse_blocks(a, b, transport=transport, **settings)
    # Gate and up have 48 rows.
    assert expected.maps.keys() - made.maps.keys() == {"gate", "up"}
    assert made.pictures.keys() == expected.pictures.keys() == expected.maps.keys()
    assert made.block.keys() == expected.block.keys()
    for name, array in expected.block.items():
        assert relative_error(made.block[name], array) < 1e-5, name
    for ours, theirs in zip(made.reports, expected.reports, strict=True):
        assert ours.match_order == theirs.match_order
        assert ours.match_gain == pytest.approx(theirs.match_gain, rel=1e-4)
