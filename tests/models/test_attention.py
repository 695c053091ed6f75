import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from opt_deus_jax.errors import UserError
from opt_deus_jax.models.attention import (
    Scoring,
    causal_attention,
    check_attention,
    splash_attention,
)


def _inputs(*, batch: int, length: int, heads: int, kv_heads: int, head_dim: int) -> list:
    draw = np.random.default_rng(0)
    shapes = [(heads,), (kv_heads,), (kv_heads,), (heads,)]
    return [
        jnp.asarray(draw.normal(size=(batch, length, *n, head_dim)), jnp.float32) for n in shapes
    ]


def _examples(batch: int, length: int) -> jax.Array:
    # Two examples of unequal length, then padding, at other places in each row.
    starts = np.arange(batch)[:, None] * 3
    places = np.arange(length)[None]
    example = 1 + (places >= 10 + starts).astype(np.int32)
    return jnp.asarray(np.where(places >= length - 4 - starts, 0, example))


def _value_and_gradients(attention, query, key, value, weights):
    def loss(query, key, value):
        attended = attention(query, key, value)
        return jnp.sum(attended * weights), attended

    (_, attended), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
        query, key, value
    )
    return (attended, *gradients)


# 12 tokens are one part of queries, 200 are four, the last of them short.
@pytest.mark.parametrize("length", [12, 200])
@pytest.mark.parametrize("packed", [False, True])
def test_reference_equals_jax(length: int, packed: bool) -> None:
    arrays = _inputs(batch=2, length=length, heads=4, kv_heads=2, head_dim=8)
    example = _examples(2, length) if packed else None
    mask = None if example is None else (example[:, :, None] == example[:, None])[:, None]
    oracle = functools.partial(jax.nn.dot_product_attention, mask=mask, is_causal=True)
    reference = functools.partial(causal_attention, example_BT=example, implementation="reference")
    expected, found = (
        jax.jit(functools.partial(_value_and_gradients, attention))(*arrays)
        for attention in (oracle, reference)
    )
    for name, one, other in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-5, err_msg=name)


# Windows within a part of the queries and across parts.
@pytest.mark.parametrize(("length", "window"), [(12, 1), (12, 5), (200, 70)])
@pytest.mark.parametrize("packed", [False, True])
def test_reference_with_a_window_equals_jax(length: int, window: int, packed: bool) -> None:
    arrays = _inputs(batch=2, length=length, heads=4, kv_heads=2, head_dim=8)
    example = _examples(2, length) if packed else None
    mask = None if example is None else (example[:, :, None] == example[:, None])[:, None]

    def oracle(query, key, value):
        return jax.nn.dot_product_attention(
            *(query, key, value), mask=mask, is_causal=True, scale=0.7,
            local_window_size=(window - 1, 0),
        )  # fmt: skip

    def reference(query, key, value):
        scoring = Scoring(scale=0.7, window=window)
        return causal_attention(query, key, value, example, "reference", scoring)

    expected, found = (
        jax.jit(functools.partial(_value_and_gradients, attention))(*arrays)
        for attention in (oracle, reference)
    )
    for name, one, other in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-5, err_msg=name)


def test_a_soft_cap_is_applied_to_scaled_scores() -> None:
    query, key, value, _ = _inputs(batch=1, length=9, heads=1, kv_heads=1, head_dim=8)
    found = causal_attention(query, key, value, None, "reference", Scoring(0.7, 1.5))
    scores = 1.5 * np.tanh(0.7 / 1.5 * np.asarray(query[0, :, 0] @ key[0, :, 0].T))
    weights = np.exp(scores) * np.tri(9)
    expected = weights / weights.sum(-1, keepdims=True) @ value[0, :, 0]
    np.testing.assert_allclose(found[0, :, 0], expected, atol=1e-5, rtol=0)


# Heads that 'tensor' divides, KV heads that it must repeat, heads that it cannot cut; a length
# that is no multiple of the kernel's block.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "tensor", "length"), [(4, 2, 2, 128), (4, 1, 2, 72), (3, 1, 2, 72)]
)
@pytest.mark.parametrize("packed", [False, True])
def test_splash_on_a_mesh_equals_reference(
    heads: int, kv_heads: int, tensor: int, length: int, packed: bool
) -> None:
    arrays = _inputs(batch=4, length=length, heads=heads, kv_heads=kv_heads, head_dim=64)
    example = _examples(4, length) if packed else None

    def reference(query, key, value):
        return causal_attention(query, key, value, example, "reference")

    splash = functools.partial(splash_attention, example_BT=example, interpret=True)
    expected = jax.jit(functools.partial(_value_and_gradients, reference))(*arrays)
    mesh = jax.make_mesh((2, 2, tensor), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        placed = [jax.device_put(array, batch) for array in arrays]
        found = jax.jit(functools.partial(_value_and_gradients, splash))(*placed)
    for name, one, other in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("scoring", [Scoring(0.3, 2.0), Scoring(None, None, 40)])
def test_splash_scores_as_the_reference(scoring: Scoring) -> None:
    arrays = _inputs(batch=1, length=130, heads=2, kv_heads=2, head_dim=16)
    splash = functools.partial(splash_attention, example_BT=None, interpret=True, scoring=scoring)

    def reference(query, key, value):
        return causal_attention(query, key, value, None, "reference", scoring)

    found, expected = (_value_and_gradients(run, *arrays) for run in (splash, reference))
    for name, one, other in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5, err_msg=name)


def test_splash_without_a_mesh_equals_reference() -> None:
    query, key, value, _ = _inputs(batch=1, length=130, heads=2, kv_heads=2, head_dim=16)
    found = splash_attention(query, key, value, None, interpret=True)
    expected = causal_attention(query, key, value, None, "reference")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"implementation": "splash", "platform": "gpu"}, "needs a TPU, the devices are gpu"),
        ({"platform": "tpu"}, "needs an NVIDIA GPU, the devices are tpu"),
        ({"compute_dtype": "float32"}, "needs training.compute_dtype=bfloat16, not float32"),
        ({"packed": True}, "set data.packing=False"),
        ({"head_dim": 100}, "multiple of 8 up to 256, the model's have 100"),
        ({"soft_cap": 50.0}, "has no cap of the scores, which the model has at 50.0"),
        ({"head_dim": 512}, "multiple of 8 up to 256, the model's have 512"),
    ],
)
def test_an_attention_that_cannot_be_used_is_refused(changes: dict, message: str) -> None:
    sound = {
        "implementation": "cudnn",
        "platform": "gpu",
        "compute_dtype": "bfloat16",
        "packed": False,
        "head_dim": 64,
        "soft_cap": None,
    }
    check_attention(**sound)
    with pytest.raises(UserError, match=message):
        check_attention(**sound | changes)


def test_cudnn_refuses_a_cap_where_it_is_called() -> None:
    query, key, value, _ = _inputs(batch=2, length=8, heads=2, kv_heads=2, head_dim=8)
    with pytest.raises(UserError, match="has no cap of the scores"):
        causal_attention(query, key, value, None, "cudnn", Scoring(soft_cap=50.0))


def test_cudnn_refuses_packed_examples_where_it_is_called() -> None:
    query, key, value, _ = _inputs(batch=2, length=8, heads=2, kv_heads=2, head_dim=8)
    with pytest.raises(UserError, match="cannot keep packed examples apart"):
        causal_attention(query, key, value, _examples(2, 8), "cudnn")
