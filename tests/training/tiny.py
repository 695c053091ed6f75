"""A network and records that train in milliseconds."""

from typing import Any

import jax
import numpy as np

from opt_deus_jax.checkpoints.source import CheckpointSource, TensorInfo
from opt_deus_jax.config import MeshConfig
from opt_deus_jax.data.records import Records
from opt_deus_jax.distributed.mesh import make_mesh
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import named_tensors


def tiny_hf_config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    } | changes


def tiny_tensors(
    hf_config: dict[str, Any], zeroed: tuple[int, ...] = (), deviation: float = 0.3
) -> dict[str, np.ndarray]:
    """Random tensors; the layers in `zeroed` are the identity, as new layers are."""
    config = read_model_config(hf_config)
    draw = np.random.default_rng(0)
    tensors = {}
    for name, spec in named_tensors(config, config.num_layers):
        tensors[name] = (deviation * draw.normal(size=spec.shape)).astype(np.float32)
        if spec.init == "ones":
            tensors[name] += 1
    for layer in zeroed:
        for projection in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{projection}.weight"][:] = 0
    return tensors


def source_of(hf_config: dict[str, Any], tensors: dict[str, np.ndarray]) -> CheckpointSource:
    infos = {name: TensorInfo(array.shape, array.dtype) for name, array in tensors.items()}
    return CheckpointSource("tiny", hf_config, infos, tensors.__getitem__, {})


def tiny_source(
    zeroed: tuple[int, ...] = (), deviation: float = 0.3, **changes: Any
) -> CheckpointSource:
    hf_config = tiny_hf_config(**changes)
    return source_of(hf_config, tiny_tensors(hf_config, zeroed, deviation))


def one_device_mesh() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def tiny_records(count: int, seed: int = 0, length: int = 8) -> Records:
    draw = np.random.default_rng(seed)
    return Records(draw.integers(0, 64, count * length + 1).astype(np.uint16), length)
