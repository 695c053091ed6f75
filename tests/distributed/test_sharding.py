from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from opt_deus_jax.config import MeshConfig, TrainingConfig
from opt_deus_jax.distributed.mesh import make_mesh
from opt_deus_jax.distributed.sharding import (
    constrain,
    gather_width,
    named_sharding,
    num_shards,
    partition_spec,
)
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import block_specs, outer_specs
from opt_deus_jax.training.placement import check_fits, local_rows, put_rows
from tests.training.tiny import tiny_hf_config


def test_every_parameter_has_a_rule():
    hf_config = tiny_hf_config(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    config = read_model_config(hf_config)
    experts = read_model_config(tiny_hf_config(model_type="mixtral"))
    of_blocks = (*block_specs(config).values(), *block_specs(experts).values())
    for spec in (*of_blocks, *outer_specs(config).values()):
        assert len(partition_spec(("layers", *spec.logical_axes))) == len(spec.shape) + 1
    assert partition_spec(("mlp", "width")) == PartitionSpec("tensor", "fsdp")
    assert partition_spec(block_specs(experts)["experts_gate_kernel"].logical_axes) == (
        PartitionSpec("tensor", None, "fsdp")
    )
    assert partition_spec(("batch", "length")) == PartitionSpec(("data", "fsdp"), None)


def test_unknown_and_colliding_axes_raise():
    with pytest.raises(ValueError, match="'depth' has no rule"):
        partition_spec(("depth", "width"))
    with pytest.raises(ValueError, match="collide"):
        partition_spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="collide"):
        partition_spec(("batch", "width"))


def test_without_a_mesh_nothing_is_cut():
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", "width") is x
    assert num_shards("batch") == 1


def test_a_gathered_kernel_gives_its_gradient_back_in_parts():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    axes = ("mlp", "width")
    kernel = jax.device_put(np.arange(32.0).reshape(4, 8), named_sharding(mesh, *axes))
    x = jax.device_put(np.arange(32.0).reshape(4, 8), named_sharding(mesh, "batch", "length"))

    def loss(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum((x @ gather_width(kernel, axes).T) ** 2)

    with jax.set_mesh(mesh):
        assert num_shards("batch") == 4
        gradient = jax.jit(jax.grad(loss))(kernel, x)
    assert gradient.sharding.is_equivalent_to(kernel.sharding, 2)
    expected = jax.grad(lambda k: jnp.sum((np.asarray(x) @ k.T) ** 2))(jnp.asarray(kernel))
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_each_process_puts_its_rows():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    rows = named_sharding(mesh, "batch")
    assert local_rows(rows, 8) == tuple(range(8))
    column = np.arange(24).reshape(8, 3)
    placed = put_rows({"tokens": column}, range(8), 8, rows)["tokens"]
    np.testing.assert_array_equal(placed, column)
    assert placed.addressable_shards[0].data.shape == (2, 3)


@pytest.mark.parametrize(
    ("mesh", "training", "message"),
    [
        ((1, 1, 8), {}, "mesh.tensor=8: does not divide the 4 of the model's heads"),
        ((1, 8, 1), {"batch_size": 12}, "training.batch_size=12: each of its 1 parts has 12"),
        (
            (2, 2, 2),
            {"batch_size": 8, "accumulation_steps": 4},
            "parts has 2 sequences, .* 4 devices; use a multiple of 16",
        ),
    ],
)
def test_what_cannot_be_cut_evenly_is_named(
    mesh: tuple[int, int, int], training: dict[str, Any], message: str
):
    config = read_model_config(tiny_hf_config())
    with pytest.raises(UserError, match=message):
        check_fits(config, TrainingConfig(**training), make_mesh(MeshConfig(*mesh), jax.devices()))
