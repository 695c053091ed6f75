"""Other coordinates, the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from opt_deus_jax.errors import UserError
from opt_deus_jax.models.language_model import apply_block, causal_inputs
from opt_deus_jax.upscaling.conditioning import balance_branches, scale_branches
from opt_deus_jax.upscaling.fusion import fuse_blocks
from tests.upscaling.symmetry_copies import config_of, random_block, run_block


def zeroed(config, block):
    return fuse_blocks(block, block, config=config, weights="copy_next", zero_init=True).block


@pytest.mark.parametrize("scale", [0.3, 4.0])
@pytest.mark.parametrize("shape", ["gqa", "biases"])
def test_scaled_branches_compute_the_same(shape, scale):
    config = config_of(shape)
    block = random_block(config, 0)
    scaled = scale_branches(block, scale)
    tolerance = 0 if scale == 4 else 1e-5
    output, wanted = run_block(config, scaled), run_block(config, block)
    assert np.linalg.norm(output - wanted) <= tolerance * np.linalg.norm(wanted)
    np.testing.assert_allclose(scaled["up_kernel"], scale * block["up_kernel"], rtol=1e-6)
    np.testing.assert_allclose(scaled["value_kernel"], scale * block["value_kernel"], rtol=1e-6)


def step_of_adam(config, block):
    """What a block adds after one step of Adam on its zeroed kernels, towards a random target."""
    x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, config.width)), "f4")
    inputs = causal_inputs(config, jnp.broadcast_to(jnp.arange(8)[None], (2, 8)))
    target = jnp.asarray(np.random.default_rng(1).standard_normal(x_BTD.shape), "f4")
    params = {name: jnp.asarray(array) for name, array in block.items()}
    outputs = {name: params[name] for name in ("output_kernel", "down_kernel")}

    def added(outputs):
        return (
            apply_block(config, config.layer_kinds[0], params | outputs, x_BTD, inputs)[0] - x_BTD
        )

    gradients = jax.grad(lambda outputs: jnp.vdot(added(outputs), target))(outputs)
    optimizer = optax.adam(1e-6)
    updates, _ = optimizer.update(gradients, optimizer.init(outputs))
    return np.asarray(added(optax.apply_updates(outputs, updates)), np.float64)


def test_a_step_of_the_zeroed_kernels_weighs_as_much_more_as_their_branches():
    config = config_of("gqa")
    block = zeroed(config, random_block(config, 0))
    plain, scaled = (step_of_adam(config, made) for made in (block, scale_branches(block, 4.0)))
    assert np.linalg.norm(scaled) / np.linalg.norm(plain) == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("shape", ["gqa", "biases"])
def test_balanced_values_are_the_polar_factor_and_up_rows_of_one_size(shape):
    config = config_of(shape)
    block = zeroed(config, random_block(config, 0))
    block["input_norm"][3] = 0.5
    block["up_kernel"][5] *= 20
    balanced = balance_branches(block, config)

    def folded(made, name, norm):
        rows = made[f"{name}_kernel"].astype(np.float64) * made[norm]
        bias = f"{name}_bias"
        return np.column_stack([rows, made[bias]]) if bias in made else rows

    for head in range(config.num_kv_heads):
        rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
        before, after = (folded(made, "value", "input_norm")[rows] for made in (block, balanced))
        # SciPy's polar factor is the nearest matrix with orthonormal rows.
        nearest, _ = scipy.linalg.polar(before)
        expected = nearest * np.linalg.norm(before) / np.sqrt(config.head_dim)
        np.testing.assert_allclose(after, expected, atol=1e-5)
    before, after = (folded(made, "up", "post_attention_norm") for made in (block, balanced))
    sizes = np.linalg.norm(before, axis=1)
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), sizes.mean(), rtol=1e-5)
    np.testing.assert_allclose(after / sizes.mean(), before / sizes[:, None], atol=1e-5)
    for name, array in block.items():
        if not name.startswith(("value", "up")):
            np.testing.assert_array_equal(balanced[name], array)


def test_only_zeroed_blocks_are_balanced():
    config = config_of("gqa")
    with pytest.raises(ValueError, match="output and down kernels are zero"):
        balance_branches(random_block(config, 0), config)


def test_a_block_with_other_parameters_is_refused():
    config = config_of("gqa")
    other = random_block(config, 0) | {"value_norm": np.ones(config.head_dim, np.float32)}
    with pytest.raises(UserError, match=r"branch_scale=2.0: what leaves a block with value_norm"):
        scale_branches(other, 2.0)
    with pytest.raises(UserError, match="balance='kernels': what leaves a block with value_norm"):
        balance_branches(other, config)
