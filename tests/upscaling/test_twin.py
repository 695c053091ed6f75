"""Twins cancel, and learn at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opt_deus_jax.errors import UserError
from opt_deus_jax.models.language_model import apply_block, causal_inputs
from opt_deus_jax.models.params import block_specs
from opt_deus_jax.upscaling.fusion import fuse_blocks
from opt_deus_jax.upscaling.twin import twin_block
from tests.upscaling.symmetry_copies import config_of, random_block, run_block


@pytest.mark.parametrize("shape", ["gqa", "biases"])
def test_twins_compute_the_identity(shape):
    config = config_of(shape)
    b = random_block(config, 1)
    twins = twin_block(b, config)
    assert twins.keys() == block_specs(config).keys()
    assert np.abs(run_block(config, twins)).max() < 1e-5 * np.abs(run_block(config, b)).max()
    for name, array in twins.items():
        zeroed = name in ("output_kernel", "output_bias", "down_bias")
        assert array.any() != zeroed, name


def test_every_neuron_is_one_of_the_next_layers_and_has_its_opposite():
    config = config_of("biases")
    b = random_block(config, 1)
    twins = twin_block(b, config)
    first, second = np.arange(24), np.arange(24, 48)
    for name in ("gate_kernel", "up_kernel", "gate_bias", "up_bias"):
        np.testing.assert_array_equal(twins[name][first], twins[name][second])
    down = twins["down_kernel"]
    np.testing.assert_array_equal(down[:, first], -down[:, second])
    same = (twins["gate_kernel"][first, None] == b["gate_kernel"][None]).all(axis=2)
    assert (same.sum(axis=1) == 1).all()
    source = same.argmax(axis=1)
    assert len(set(source.tolist())) == 24
    np.testing.assert_array_equal(twins["up_kernel"][first], b["up_kernel"][source])
    np.testing.assert_array_equal(down[:, first], b["down_kernel"][:, source])


def test_neither_massive_nor_dead_neurons_are_taken():
    config = config_of("gqa")
    b = random_block(config, 1)
    b["gate_kernel"][7] *= 100
    b["gate_kernel"][9] /= 100
    b["down_kernel"][:, 11] = 0
    taken = twin_block(b, config)["gate_kernel"]
    for neuron in (7, 9, 11):
        assert not (taken == b["gate_kernel"][neuron]).all(axis=1).any()


def test_an_odd_neuron_out_adds_nothing():
    config = dataclasses.replace(config_of("mha"), mlp_width=47)
    b = random_block(config, 1)
    twins = twin_block(b, config)
    assert not twins["down_kernel"][:, 46].any()
    assert np.abs(run_block(config, twins)).max() < 1e-5 * np.abs(run_block(config, b)).max()


def test_every_kernel_of_the_mlp_gets_a_gradient_at_once_and_twins_part():
    config = config_of("gqa")
    b = random_block(config, 1)

    def gradients(block):
        params = {name: jnp.asarray(array) for name, array in block.items()}
        x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, config.width)), "f4")
        inputs = causal_inputs(config, jnp.broadcast_to(jnp.arange(8)[None], (2, 8)))

        def loss(params):
            return jnp.sum(
                jnp.sin(apply_block(config, config.layer_kinds[0], params, x_BTD, inputs)[0])
            )

        return jax.grad(loss)(params)

    twins = gradients(twin_block(b, config))
    for name in ("gate_kernel", "up_kernel"):
        gradient = np.asarray(twins[name])
        assert (np.linalg.norm(gradient, axis=1) > 0).all()
        np.testing.assert_allclose(gradient[:24], -gradient[24:], atol=1e-4)
    assert np.asarray(twins["down_kernel"]).any()
    zeroed = fuse_blocks(b, b, config=config, weights="copy_next", zero_init=True).block
    assert not np.asarray(gradients(zeroed)["gate_kernel"]).any()


def test_a_block_with_other_parameters_is_refused():
    config = config_of("gqa")
    other = random_block(config, 0) | {"query_norm": np.ones(config.head_dim, np.float32)}
    with pytest.raises(UserError, match="method='twin': what leaves a block with query_norm"):
        twin_block(other, config)
