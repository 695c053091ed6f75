"""The network's hyper-parameters, read from a Hugging Face config.json and nothing else."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from opt_deus_jax.errors import UserError

# Fields that do not change what the network computes: names, versions, generation defaults.
_INERT = frozenset(
    [
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "head_dim",
        "hidden_size",
        "id2label",
        "initializer_range",
        "intermediate_size",
        "is_decoder",
        "is_encoder_decoder",
        "is_llama_config",
        "label2id",
        "max_position_embeddings",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
        "vocab_size",
        "attention_bias",
        "mlp_bias",
    ]
)
# Fields that are honoured only at the value that every Llama has.
_REQUIRED_VALUES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, 0.0, None),
    "pretraining_tp": (1, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "torchscript": (False,),
    "sliding_window": (None,),
}
_ROPE_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        theta: Base of the frequencies.
        kind: `default`, `linear` (position interpolation) or `llama3`.
        factor: How much longer the context is than the original one.
        low_frequency_factor: For `llama3`: wavelengths above original/low are stretched.
        high_frequency_factor: For `llama3`: wavelengths below original/high are kept.
        original_max_positions: For `llama3`: the context of pre-training.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 1.0
    original_max_positions: int = 0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-family network. Hashable, so it can be a static argument of jit."""

    vocabulary_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_epsilon: float
    rope: RopeConfig
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    initializer_range: float


def _read_rope(hf_config: Mapping[str, Any], where: str) -> RopeConfig:
    # transformers 5 writes one `rope_parameters`; before it, `rope_theta` and `rope_scaling`.
    given = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: field rope_scaling={given!r} must be an object or null")
    fields = dict(given)
    theta = fields.pop("rope_theta", hf_config.get("rope_theta", 10000.0))
    kind = fields.pop("rope_type", fields.pop("type", "default"))
    fields.pop("type", None)
    if kind not in _ROPE_KEYS:
        raise UserError(
            f"{where}: rope type {kind!r} is not supported; use a checkpoint with one of "
            f"{', '.join(_ROPE_KEYS)}"
        )
    if not all(_is_number(value) for value in (theta, *fields.values())):
        raise UserError(f"{where}: rope_theta={theta!r} and {fields} must be numbers")
    if set(fields) != _ROPE_KEYS[kind]:
        raise UserError(
            f"{where}: rope type {kind!r} needs exactly the fields {sorted(_ROPE_KEYS[kind])}, "
            f"found {sorted(fields)}; correct rope_scaling"
        )
    return RopeConfig(
        theta=float(theta),
        kind=kind,
        factor=float(fields.get("factor", 1.0)),
        low_frequency_factor=float(fields.get("low_freq_factor", 1.0)),
        high_frequency_factor=float(fields.get("high_freq_factor", 1.0)),
        original_max_positions=int(fields.get("original_max_position_embeddings", 0)),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse_unknown(hf_config: Mapping[str, Any], where: str) -> None:
    model_type = hf_config.get("model_type")
    if model_type != "llama":
        raise UserError(
            f"{where}: architecture model_type={model_type!r} is not supported; supported: llama"
        )
    for key, value in hf_config.items():
        if key in _REQUIRED_VALUES:
            if value not in _REQUIRED_VALUES[key]:
                raise UserError(
                    f"{where}: field {key}={value!r} is not supported; it must be "
                    f"{_REQUIRED_VALUES[key][0]!r}"
                )
        elif key not in _INERT:
            raise UserError(
                f"{where}: unknown field {key}={value!r}; remove it if it does not change what "
                "the network computes"
            )


def _read_sizes(hf_config: Mapping[str, Any], where: str) -> tuple[int, int, int]:
    """Heads, KV heads and head size, once every number in the config is known to be sound."""
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    for key in (*needed, "num_attention_heads"):
        if not isinstance(hf_config.get(key), int) or hf_config[key] < 1:
            raise UserError(
                f"{where}: field {key}={hf_config.get(key)!r} must be a positive integer"
            )
    for key in ("num_key_value_heads", "head_dim", "max_position_embeddings"):
        if not isinstance(hf_config.get(key), int | None):
            raise UserError(f"{where}: field {key}={hf_config[key]!r} must be an integer")
    for key in ("rms_norm_eps", "initializer_range"):
        if not _is_number(hf_config.get(key, 1.0)):
            raise UserError(f"{where}: field {key}={hf_config[key]!r} must be a number")
    num_heads = hf_config["num_attention_heads"]
    num_kv_heads = hf_config.get("num_key_value_heads") or num_heads
    head_dim = hf_config.get("head_dim") or hf_config["hidden_size"] // num_heads
    if not hf_config.get("head_dim") and hf_config["hidden_size"] % num_heads:
        raise UserError(
            f"{where}: hidden_size={hf_config['hidden_size']} is not a multiple of "
            f"num_attention_heads={num_heads}; add head_dim"
        )
    if num_heads % num_kv_heads:
        raise UserError(
            f"{where}: num_attention_heads={num_heads} is not a multiple of "
            f"num_key_value_heads={num_kv_heads}"
        )
    if head_dim % 2:
        raise UserError(f"{where}: head_dim={head_dim} must be even for rotary embeddings")
    epsilon = float(hf_config.get("rms_norm_eps", 1e-6))
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise UserError(f"{where}: field rms_norm_eps={epsilon!r} must be positive")
    return num_heads, num_kv_heads, head_dim


def read_model_config(hf_config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Translates a Hugging Face config of the Llama architecture.

    Every field is honoured, known not to matter, or refused by name.

    Args:
        hf_config: The content of config.json.
        where: What error messages call it.

    Returns:
        The hyper-parameters.

    Raises:
        UserError: Another architecture, an unknown field or rope type, or sizes that contradict
            each other.
    """
    _refuse_unknown(hf_config, where)
    num_heads, num_kv_heads, head_dim = _read_sizes(hf_config, where)
    return ModelConfig(
        vocabulary_size=hf_config["vocab_size"],
        width=hf_config["hidden_size"],
        mlp_width=hf_config["intermediate_size"],
        num_layers=hf_config["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=int(hf_config.get("max_position_embeddings", 2048)),
        norm_epsilon=float(hf_config.get("rms_norm_eps", 1e-6)),
        rope=_read_rope(hf_config, where),
        tied_embeddings=bool(hf_config.get("tie_word_embeddings", False)),
        attention_bias=bool(hf_config.get("attention_bias", False)),
        mlp_bias=bool(hf_config.get("mlp_bias", False)),
        initializer_range=float(hf_config.get("initializer_range", 0.02)),
    )


def grown_hf_config(hf_config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Rewrites every field that depends on depth.

    Args:
        hf_config: The base's config.json; already accepted by `read_model_config`, which refuses
            every field that it does not know, so no per-layer field can slip through.
        num_layers: Depth of the grown model.

    Returns:
        A new config.json.
    """
    return {**hf_config, "num_hidden_layers": num_layers}
