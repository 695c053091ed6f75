"""Experts by grouped products, against every expert on every token; and on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from opt_deus_jax.distributed.sharding import named_sharding
from opt_deus_jax.errors import UserError
from opt_deus_jax.models import products
from opt_deus_jax.models.expert_config import ExpertConfig
from opt_deus_jax.models.moe import apply_experts, check_experts, route

TOKENS, WIDTH, INNER = 16, 12, 10
KERNELS = {
    "experts_gate_kernel": (8, INNER, WIDTH),
    "experts_up_kernel": (8, INNER, WIDTH),
    "experts_down_kernel": (8, WIDTH, INNER),
}
AXES = {name: ("expert", "expert_mlp", "width") for name in KERNELS} | {
    "experts_down_kernel": ("expert", "width", "expert_mlp"),
    "router_kernel": ("all_experts", "width"),
}


def arrays(dtype=jnp.float32):
    """Tokens, parameters of a block with eight experts, and what outputs are weighed with."""
    draw = np.random.default_rng(0)
    shapes = KERNELS | {"router_kernel": (8, WIDTH)}
    block = {name: jnp.asarray(draw.normal(0, 0.5, shape), dtype) for name, shape in shapes.items()}
    # Nothing is sent to the last expert, most to the first.
    block["router_kernel"] = block["router_kernel"].at[7].set(0).at[7, 0].set(-50)
    x_MD, out_MD = (jnp.asarray(draw.normal(size=(TOKENS, WIDTH)), jnp.float32) for _ in range(2))
    return x_MD.at[:, 0].set(abs(x_MD[:, 0]) + 0.5), block, out_MD


def made_and_gradients(implementation, x_MD, block, out_MD, per_token=3):
    """What the experts make, and the gradients of tokens, kernels and router."""
    experts = ExpertConfig(8, per_token, INNER, is_normalized=True, balance=0.0)

    def loss(x_MD, block):
        routing = route(x_MD, block["router_kernel"].astype(x_MD.dtype), experts)
        made_MD = apply_experts(x_MD, routing, block, jax.nn.silu, implementation)
        return jnp.sum(made_MD * out_MD), (made_MD, routing.chosen_ME)

    (_, made), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x_MD, block)
    return made, gradients


@functools.cache
def dense():
    return jax.device_get(jax.jit(functools.partial(made_and_gradients, "dense"))(*arrays()))


def assert_same(found, expected, tolerance=1e-5):
    def compare(path, a, b):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        scale = np.max(np.abs(b))
        assert scale > 0, jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=str(path))

    jax.tree_util.tree_map_with_path(compare, jax.device_get(found), expected)


def test_grouped_experts_make_what_all_of_them_make():
    (_, chosen_ME), _ = dense()
    sent_E = chosen_ME.sum(axis=0)
    assert sent_E[7] == 0
    assert sent_E.max() > 2 * sent_E[:7].min()
    assert_same(
        jax.jit(functools.partial(made_and_gradients, "grouped"))(*arrays()),
        dense(),
    )


def test_kernels_of_a_lower_type_are_multiplied_as_elsewhere():
    found, expected = (
        jax.jit(functools.partial(made_and_gradients, implementation))(*arrays(jnp.bfloat16))
        for implementation in ("grouped", "dense")
    )
    # The activations, and the gradients of the kernels, are rounded to that type.
    assert_same(found, jax.device_get(expected), 2**-8)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 1, 8), (2, 2, 2)])
def test_on_a_mesh_each_device_adds_what_its_experts_make(shape):
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    x_MD, block, out_MD = arrays()
    tokens = named_sharding(mesh, "batch", "gathered_width")
    block = {
        name: jax.device_put(kernel, named_sharding(mesh, *AXES[name]))
        for name, kernel in block.items()
    }
    x_MD, out_MD = (jax.device_put(array, tokens) for array in (x_MD, out_MD))
    with jax.set_mesh(mesh):
        found = jax.jit(functools.partial(made_and_gradients, "grouped"))(x_MD, block, out_MD)
    assert_same(found, dense())


def test_what_stands_in_rows_of_no_held_expert_stays_there(monkeypatch):
    multiply = products._multiply_ragged

    def leave_rows(dimensions, left, right, size_E):
        made = multiply(dimensions, left, right, size_E)
        if not dimensions.rhs_group_dimensions:
            return made
        is_held_R1 = (jnp.arange(len(left)) < jnp.sum(size_E))[:, None]
        return jnp.where(is_held_R1, made, jnp.nan)

    monkeypatch.setattr(products, "_multiply_ragged", leave_rows)
    test_on_a_mesh_each_device_adds_what_its_experts_make((1, 1, 8))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_for_tpus_sums_what_the_portable_product_does(dtype):
    draw = np.random.default_rng(0)
    y_RO, x_RD = (jnp.asarray(draw.normal(size=(700, size)), dtype) for size in (24, 40))
    # Groups within a tile, over two, of no row; and rows of no group.
    size_E = jnp.array([3, 0, 530, 100], jnp.int32)
    found = products.kernels_by_megablox(y_RO, x_RD, size_E, interpret=True)
    ends = np.cumsum(size_E)
    expected = [
        np.asarray(y_RO[end - size : end], np.float64).T
        @ np.asarray(x_RD[end - size : end], np.float64)
        for size, end in zip(np.asarray(size_E), ends, strict=True)
    ]
    assert found.dtype == dtype
    # Sums are float32 in both; bfloat16 ones are rounded once.
    rtol = 2**-8 if dtype == jnp.bfloat16 else 0
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=rtol, atol=1e-4)


def test_a_network_without_experts_has_no_way_to_apply_them():
    check_experts("dense", None)
    check_experts("grouped", ExpertConfig(4, 2, 8, is_normalized=True, balance=0.0))
    with pytest.raises(UserError, match="training.experts='grouped': the model has no experts"):
        check_experts("grouped", None)
