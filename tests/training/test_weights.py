import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from opt_deus_jax.config import MeshConfig
from opt_deus_jax.distributed.mesh import make_mesh
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import ModelConfig, read_model_config
from opt_deus_jax.training.placement import abstract_params, param_shardings
from opt_deus_jax.training.segments import (
    invert_mask,
    merge,
    plan_segments,
    select_trained,
    trained_mask,
)
from opt_deus_jax.training.weights import (
    load_params,
    parameter_hash,
)
from tests.training.stacking import tensors_of
from tests.training.tiny import source_of, tiny_hf_config, tiny_tensors

HF_CONFIG = tiny_hf_config(num_hidden_layers=5, attention_bias=True, tie_word_embeddings=False)
MASK = [False, True, False, True, False]
FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return read_model_config(HF_CONFIG)


@pytest.fixture(scope="module")
def device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return tiny_tensors(HF_CONFIG)


def test_tensors_go_in_and_come_out_by_name(config, device, tensors):  # noqa: ANN001
    names = select_trained(config, MASK, "new")
    segments = plan_segments(names.blocks)
    params = load_params(
        source_of(HF_CONFIG, tensors), config, segments, dtype=FLOAT32, shardings=device
    )
    found = tensors_of(params, config, segments)
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)
    abstract = abstract_params(config, segments, FLOAT32, device)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), params
    )


def test_trained_masters_and_frozen_bfloat16_make_the_whole(config, device, tensors):  # noqa: ANN001
    names = select_trained(config, MASK, "new")
    segments = plan_segments(names.blocks)
    mask = trained_mask(config, segments, names.outer)
    source = source_of(HF_CONFIG, tensors)
    trainable = load_params(source, config, segments, dtype=FLOAT32, shardings=device, wanted=mask)
    frozen = load_params(
        source, config, segments, dtype=BFLOAT16, shardings=device, wanted=invert_mask(mask)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {FLOAT32}
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {BFLOAT16}
    assert len(jax.tree.leaves(merge(trainable, frozen))) == len(jax.tree.leaves(mask))

    rounded = tensors_of(frozen, config, segments)["lm_head.weight"]
    np.testing.assert_array_equal(rounded, tensors["lm_head.weight"].astype(ml_dtypes.bfloat16))


def test_a_checkpoint_that_does_not_fit_is_refused(config, device, tensors):  # noqa: ANN001
    def load(changed: dict[str, np.ndarray]) -> None:
        load_params(
            source_of(HF_CONFIG, changed),
            config,
            plan_segments(select_trained(config, MASK, "new").blocks),
            dtype=FLOAT32,
            shardings=device,
        )

    name = "model.layers.3.self_attn.q_proj.bias"
    with pytest.raises(UserError, match=f"{name} is missing"):
        load({key: array for key, array in tensors.items() if key != name})
    with pytest.raises(UserError, match=r"q_norm.weight has no place"):
        load(tensors | {"model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32)})
    with pytest.raises(UserError, match=f"{name} has shape"):
        load(tensors | {name: np.ones(31, np.float32)})


def test_hash_sees_path_dtype_shape_and_bytes():
    tree = {"b": jnp.arange(4.0), "a": [None, np.ones((), np.int32)]}
    expected = hashlib.sha256(
        b"['a'][1] int32 ()\n"
        + np.ones((), np.int32).tobytes()
        + b"['b'] float32 (4,)\n"
        + np.arange(4, dtype=np.float32).tobytes()
    )
    assert parameter_hash(tree) == expected.hexdigest()
    others = [
        {"c": tree["b"], "a": tree["a"]},
        tree | {"b": jnp.arange(4)},
        tree | {"b": jnp.arange(4.0).reshape(2, 2)},
        tree | {"b": jnp.arange(4.0).at[0].set(-0.0)},
        tree | {"b": jnp.arange(4.0).astype(BFLOAT16)},
    ]
    assert len({parameter_hash(other) for other in [tree, *others]}) == 6


def test_each_device_reads_its_part_alone(config, tensors):  # noqa: ANN001
    segments = plan_segments(select_trained(config, MASK, "new").blocks)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    read = []

    def read_slice(name: str, part: tuple[slice, ...]) -> np.ndarray:
        read.append(tensors[name][part].nbytes)
        return tensors[name][part]

    source = dataclasses.replace(source_of(HF_CONFIG, tensors), read_slice=read_slice)
    shardings = param_shardings(config, segments, mesh)
    params = load_params(source, config, segments, dtype=FLOAT32, shardings=shardings)
    for name, array in tensors_of(params, config, segments).items():
        np.testing.assert_array_equal(array, tensors[name])
    # Groups along `data` hold the same parts, which are read once.
    vectors = sum(array.nbytes for array in tensors.values() if array.ndim == 1)
    assert sum(read) <= sum(array.nbytes for array in tensors.values()) + vectors
    kernel = params["segments"][0][0]["gate_kernel"]
    assert kernel.addressable_shards[0].data.shape == (kernel.shape[0], 24, 16)
