"""Reads GGUF files of Llama and Gemma 3 as if they were Hugging Face checkpoints."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal

import gguf
import gguf.quants
import ml_dtypes
import numpy as np
import numpy.typing as npt

from opt_deus_jax.checkpoints.gguf_fields import ANOTHER_WAY, required
from opt_deus_jax.checkpoints.gguf_tokenizer import special_token_ids, tokenizer_side_files
from opt_deus_jax.checkpoints.source import CheckpointSource, TensorInfo
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import named_tensors

_Type = gguf.GGMLQuantizationType
_OWN_DTYPES = {
    _Type.F32: np.dtype(np.float32),
    _Type.F16: np.dtype(np.float16),
    _Type.BF16: np.dtype(ml_dtypes.bfloat16),
}
_QUANTIZED = (_Type.Q8_0, _Type.Q4_0, _Type.Q4_1, _Type.Q5_0, _Type.Q4_K, _Type.Q6_K)

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LLAMA_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """How llama.cpp stores an architecture.

    Attributes:
        model_type: That of its config.json.
        class_name: transformers' class.
        block_names: Hugging Face names of the tensors of a block by GGUF's.
        has_pairs: Whether the rows of queries and keys are in the order of rotary pairs.
        norm_offset: What has been added to the scales of norms.
    """

    model_type: str
    class_name: str
    block_names: Mapping[str, str]
    has_pairs: bool
    norm_offset: float


_ARCHITECTURES = {
    "llama": _Architecture("llama", "LlamaForCausalLM", _LLAMA_NAMES, True, 0.0),
    "gemma3": _Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {
            **_LLAMA_NAMES,
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        has_pairs=False,
        norm_offset=1.0,
    ),
}
# Layers of a period of Gemma 3, of which the last has no window; in no field of older files.
_GEMMA_PERIOD = 6
# The one size whose queries are not scaled by the size of a head, known by its depth.
_GEMMA_27B_LAYERS = 62


class _Reader(gguf.GGUFReader):
    """The library's, whose slices of the mapped file are plain arrays."""

    def _get(
        self,
        offset: int,
        dtype: npt.DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[Any]:
        # The library slices a memmap, which takes four times as long as this: 6 seconds for the
        # 250,000 slices of SmolLM2's vocabulary.
        order = override_order or self.byte_order
        return np.frombuffer(
            self.data, np.dtype(dtype).newbyteorder(order), count=int(count), offset=int(offset)
        )


def open_gguf(path: pathlib.Path) -> CheckpointSource:
    """Opens a GGUF file of one of the supported architectures.

    The file is memory-mapped; a tensor is dequantised when it is read. Quantised tensors become
    float32, the others keep their dtype. llama.cpp's order of query and key rows, and what it adds
    to the scales of norms, is undone.

    Args:
        path: The .gguf file.

    Returns:
        The checkpoint under Hugging Face names and shapes, with its tokenizer files.

    Raises:
        UserError: The file is missing, damaged, incomplete, or holds an architecture, tensor type,
            rotary scaling or tokenizer that is not supported.
    """
    reader, metadata = _open_reader(path)
    architecture = _check_supported(reader, metadata, path)
    stored = _by_hf_name(reader.tensors, architecture, path)
    hf_config = _hf_config(metadata, stored, path)
    tensors = {
        name: TensorInfo(
            shape=tuple(int(size) for size in reversed(tensor.shape)),
            dtype=_OWN_DTYPES.get(tensor.tensor_type, np.dtype(np.float32)),
        )
        for name, tensor in stored.items()
    }
    _check_tensors(tensors, hf_config, path)
    return CheckpointSource(
        name=str(path),
        hf_config=hf_config,
        tensors=tensors,
        read=functools.partial(_read, stored, tensors, architecture, hf_config),
        side_files=tokenizer_side_files(metadata, path),
    )


def _open_reader(path: pathlib.Path) -> tuple[gguf.GGUFReader, dict[str, Any]]:
    try:
        reader = _Reader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    # The reader has no exception of its own: a cut file shows up as any of these.
    except (ValueError, LookupError, TypeError, ArithmeticError, MemoryError) as error:
        raise UserError(
            f"{path}: not a complete GGUF file ({error}); it may be cut short or be another kind "
            "of file: download it again"
        ) from error
    return reader, metadata


def _check_supported(
    reader: gguf.GGUFReader, metadata: Mapping[str, Any], path: pathlib.Path
) -> _Architecture:
    architecture = required(metadata, "general.architecture", str, path)
    if architecture not in _ARCHITECTURES:
        raise UserError(
            f"{path}: its architecture is {architecture!r}; only {', '.join(_ARCHITECTURES)} are "
            f"read from GGUF: {ANOTHER_WAY}"
        )
    if reader.byte_order != "I":
        raise UserError(
            f"{path}: written in the other byte order; convert it with gguf-convert-endian"
        )
    if metadata.get("split.count", 1) > 1:
        raise UserError(
            f"{path}: one of {metadata['split.count']} parts of a model; join them with "
            "llama-gguf-split --merge"
        )
    experts = metadata.get(f"{architecture}.expert_count", 0)
    if experts > 0:
        raise UserError(
            f"{path}: a mixture of {experts} experts, which is not read from GGUF: {ANOTHER_WAY}"
        )
    for tensor in reader.tensors:
        if tensor.tensor_type not in (*_OWN_DTYPES, *_QUANTIZED):
            supported = ", ".join(kind.name for kind in (*_OWN_DTYPES, *_QUANTIZED))
            raise UserError(
                f"{path}: tensor {tensor.name} is of type {tensor.tensor_type.name}, which is not "
                f"one of {supported}; take a file quantised to one of these"
            )
    return _ARCHITECTURES[architecture]


def _hf_name(name: str, block_names: Mapping[str, str]) -> str | None:
    """Hugging Face name of a GGUF tensor, None for a tensor that the architecture does not have."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in block_names:
        return _GLOBAL_NAMES.get(name)
    return f"model.layers.{int(match[1])}.{block_names[match[2]]}.{match[3]}"


def _by_hf_name(
    tensors: list[gguf.ReaderTensor], architecture: _Architecture, path: pathlib.Path
) -> dict[str, gguf.ReaderTensor]:
    stored = {}
    for tensor in tensors:
        if tensor.name == "rope_freqs.weight":
            raise UserError(
                f"{path}: tensor rope_freqs.weight holds the llama3 rotary scaling, whose settings "
                f"a GGUF file does not name: {ANOTHER_WAY}"
            )
        name = _hf_name(tensor.name, architecture.block_names)
        if name is None:
            raise UserError(
                f"{path}: tensor {tensor.name} has no place in a {architecture.class_name}: "
                f"{ANOTHER_WAY}"
            )
        stored[name] = tensor
    return stored


def _hf_config(
    metadata: Mapping[str, Any], stored: Mapping[str, Any], path: pathlib.Path
) -> dict[str, Any]:
    name = metadata["general.architecture"]
    architecture = _ARCHITECTURES[name]

    def integer(key: str) -> int:
        return required(metadata, f"{name}.{key}", int, path)

    def optional(key: str, default: Any) -> Any:
        # A key that is there is checked like a required one.
        full_key = f"{name}.{key}"
        if full_key not in metadata:
            return default
        return required(metadata, full_key, type(default), path)

    heads = integer("attention.head_count")
    hidden_size = integer("embedding_length")
    if heads < 1 or (hidden_size % heads and f"{name}.attention.key_length" not in metadata):
        raise UserError(
            f"{path}: {name}.embedding_length {hidden_size} is not a multiple of "
            f"{name}.attention.head_count {heads}; download the file again"
        )
    head_dim = optional("attention.key_length", hidden_size // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if optional(key, head_dim) != head_dim:
            raise UserError(
                f"{path}: {name}.{key} is {metadata[f'{name}.{key}']}, but the heads are "
                f"{head_dim} wide; Hugging Face has no such setting: {ANOTHER_WAY}"
            )
    epsilon = required(metadata, f"{name}.attention.layer_norm_rms_epsilon", float, path)
    ids = special_token_ids(metadata, path)
    vocabulary = len(required(metadata, "tokenizer.ggml.tokens", list, path))
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "hidden_size": hidden_size,
        "intermediate_size": integer("feed_forward_length"),
        "num_hidden_layers": integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": optional("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": optional("vocab_size", vocabulary),
        "max_position_embeddings": integer("context_length"),
        "rms_norm_eps": _shortest(epsilon),
        # What llama.cpp takes where the key is absent.
        "rope_theta": _shortest(optional("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(metadata, path),
        "tie_word_embeddings": "lm_head.weight" not in stored,
        "bos_token_id": ids["bos_token"],
        "eos_token_id": ids["eos_token"],
        "pad_token_id": ids["pad_token"],
        "attention_bias": any(name.endswith("_proj.bias") for name in stored if "attn" in name),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "dtype": "float32",
        "use_cache": True,
        **(_gemma_fields if name == "gemma3" else _llama_fields)(metadata, stored, path),
    }


def _llama_fields(
    metadata: Mapping[str, Any], stored: Mapping[str, Any], path: pathlib.Path
) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "mlp_bias": any(name.endswith("_proj.bias") for name in stored if "mlp" in name),
    }


def _gemma_fields(
    metadata: Mapping[str, Any], stored: Mapping[str, Any], path: pathlib.Path
) -> dict[str, Any]:
    period = metadata.get("gemma3.attention.sliding_window_pattern", _GEMMA_PERIOD)
    caps = [key for key in metadata if key.endswith("logit_softcapping")]
    if period != _GEMMA_PERIOD or caps:
        key = caps[0] if caps else "gemma3.attention.sliding_window_pattern"
        raise UserError(
            f"{path}: {key} is {metadata[key]}, which no published Gemma 3 has: {ANOTHER_WAY}"
        )
    layers = required(metadata, "gemma3.block_count", int, path)
    scalar = required(metadata, "gemma3.attention.key_length", int, path)
    if layers == _GEMMA_27B_LAYERS:
        scalar = metadata["gemma3.embedding_length"] // metadata["gemma3.attention.head_count"]
    window = required(metadata, "gemma3.attention.sliding_window", int, path)
    local_base = metadata.get("gemma3.rope.freq_base_swa", 10000.0)
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "rope_local_base_freq": _shortest(local_base),
        "sliding_window": window,
        "layer_types": [
            "sliding_attention" if (depth + 1) % _GEMMA_PERIOD else "full_attention"
            for depth in range(layers)
        ],
    }


def _rope_scaling(metadata: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any] | None:
    # The second key is how files of 2023 say it.
    name = metadata["general.architecture"]
    factor_keys = (f"{name}.rope.scaling.factor", f"{name}.rope.scale_linear")
    factor_key = next((key for key in factor_keys if key in metadata), None)
    kind = metadata.get(f"{name}.rope.scaling.type", "linear" if factor_key else "none")
    if kind == "none":
        return None
    if kind == "linear":
        factor = required(metadata, factor_key or factor_keys[0], float, path)
        return {"rope_type": "linear", "factor": _shortest(factor)}
    raise UserError(
        f"{path}: {name}.rope.scaling.type is {kind!r}; only 'linear' is read from GGUF: "
        f"{ANOTHER_WAY}"
    )


def _shortest(value: float) -> float:
    """The decimal that was meant: 1e-05 where float32 has stored 9.999999747378752e-06."""
    single = np.float32(value)
    return float(str(single)) if float(single) == value else value


def _check_tensors(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], path: pathlib.Path
) -> None:
    model = read_model_config(config, str(path))
    expected = {name: spec.shape for name, spec in named_tensors(model, model.num_layers)}
    missing = sorted(expected.keys() - tensors.keys())
    extra = sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise UserError(
            f"{path}: the tensors do not fit the metadata: missing {missing[:3] or 'none'}, "
            f"unexpected {extra[:3] or 'none'}; download the file again"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{path}: {name} has shape {tensors[name].shape}, but the metadata makes it "
                f"{shape}; download the file again"
            )


def _read(
    stored: Mapping[str, gguf.ReaderTensor],
    tensors: Mapping[str, TensorInfo],
    architecture: _Architecture,
    config: Mapping[str, Any],
    name: str,
) -> np.ndarray:
    tensor, info = stored[name], tensors[name]
    if tensor.tensor_type in _QUANTIZED:
        values = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    else:
        # A copy, since a view would keep the mapped file open and read-only.
        values = np.array(tensor.data, subok=False).view(info.dtype)
    values = values.reshape(info.shape)
    if architecture.norm_offset and name.endswith("norm.weight"):
        return values - values.dtype.type(architecture.norm_offset)
    if not architecture.has_pairs:
        return values
    if ".q_proj." in name:
        return _undo_rotary_order(values, config["num_attention_heads"])
    if ".k_proj." in name:
        return _undo_rotary_order(values, config["num_key_value_heads"])
    return values


def _undo_rotary_order(values: np.ndarray, heads: int) -> np.ndarray:
    """Puts the rows of each head back from interleaved pairs into two halves.

    Inverse of `permute` in llama.cpp's convert_hf_to_gguf.py, for matrices and biases alike.
    """
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
