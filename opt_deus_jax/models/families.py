"""The architectures: a row of facts for each, and nothing that is computed differently elsewhere.

A family is named by the `model_type` of its config.json. What the rows have in common is Llama.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

Fields = Mapping[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"

# Fields that do not change what any network computes: names, versions, generation defaults.
INERT = frozenset(
    [
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    ]
)
# What every config.json has, and what transformers takes where it has it not.
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    "num_attention_heads",
)
_COMMON: Fields = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": None,
}
# Fields that are honoured only at these values.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "attention_dropout": (0, 0.0, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "torchscript": (False,),
}


def _all_full(fields: Fields) -> Sequence[str]:
    return (FULL,) * fields["num_hidden_layers"]


@dataclasses.dataclass(frozen=True)
class Family:
    """What tells an architecture from the others.

    Attributes:
        defaults: Further fields of its config.json that are honoured, or other defaults of common
            ones: those of transformers' config class.
        fixed: Further fields that are honoured only at these values.
        inert: Further fields that change nothing.
        norms: Hugging Face names of the norms of a block by ours: `input_norm` and
            `post_attention_norm` are taken of the residual stream before attention and before the
            MLP, `attention_output_norm` and `mlp_output_norm` of what is added to it.
        query_key_norm: Whether queries and keys are normalised before they are rotated: no, each
            head, or all heads of a token together.
        norm_offset: What is added to the stored scale of a norm.
        norm_in_float32: Whether a norm is scaled before it is rounded to the compute dtype.
        qkv_bias: Whether queries, keys and values have biases; None where `attention_bias` says.
        output_bias: Whether the output of attention has one; None where `attention_bias` says.
        fused: Kernels that checkpoints store as one, [a; b; ...], by the name of the whole.
        activation_field: The field that names the MLP's activation.
        layer_types: Types of the layers where config.json has no `layer_types`.
        has_local_rope: Whether sliding layers have a rotary embedding of their own.
        scales_embedding: Whether the embedding is multiplied by the root of the width.
    """

    defaults: Fields
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    norms: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {
            "input_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
        }
    )
    query_key_norm: Literal["none", "head", "projection"] = "none"
    norm_offset: float = 0.0
    norm_in_float32: bool = False
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    activation_field: str = "hidden_act"
    layer_types: Callable[[Fields], Sequence[str]] = _all_full
    has_local_rope: bool = False
    scales_embedding: bool = False

    @property
    def all_defaults(self) -> Fields:
        """Every field that is honoured beside `SIZES`, with its default."""
        return {**_COMMON, **self.defaults}

    @property
    def all_fixed(self) -> Mapping[str, tuple[Any, ...]]:
        """Every field that is honoured only at some values, with those."""
        return {**_FIXED, **self.fixed}


def _all_sliding(fields: Fields) -> Sequence[str]:
    kind = FULL if fields["sliding_window"] is None else SLIDING
    return (kind,) * fields["num_hidden_layers"]


def _sliding_from_boundary(fields: Fields) -> Sequence[str]:
    has_window = fields["use_sliding_window"] and fields["sliding_window"] is not None
    boundary = fields["max_window_layers"]
    return [
        SLIDING if has_window and depth >= boundary else FULL
        for depth in range(fields["num_hidden_layers"])
    ]


def _sliding_without_rope(fields: Fields) -> Sequence[str]:
    has_window = fields["use_sliding_window"] and fields["sliding_window"] is not None
    return [FULL if rotates or not has_window else SLIDING for rotates in rope_layers(fields)]


def rope_layers(fields: Fields) -> Sequence[int]:
    """Which layers are rotated, 1 or 0 for each, of an architecture that rotates only some."""
    num_layers, period = fields["num_hidden_layers"], fields["no_rope_layer_interval"]
    if fields["no_rope_layers"] is not None:
        return fields["no_rope_layers"][:num_layers]
    return [int((depth + 1) % period != 0) for depth in range(num_layers)]


def _alternating(fields: Fields) -> Sequence[str]:
    return [FULL if depth % 2 else SLIDING for depth in range(fields["num_hidden_layers"])]


def _full_once_a_period(fields: Fields) -> Sequence[str]:
    period = fields["sliding_window_pattern"]
    return [
        SLIDING if (depth + 1) % period else FULL for depth in range(fields["num_hidden_layers"])
    ]


_QWEN2: Fields = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA: Fields = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
_GEMMA2 = Family(
    defaults={
        **_GEMMA,
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    fixed={"use_bidirectional_attention": (False, None)},
    # Its published configs have two names of the activation; the network reads the other one.
    inert=frozenset({"cache_implementation", "hidden_act"}),
    activation_field="hidden_activation",
    norms={
        "input_norm": "input_layernorm",
        "attention_output_norm": "post_attention_layernorm",
        "post_attention_norm": "pre_feedforward_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    },
    norm_offset=1.0,
    norm_in_float32=True,
    layer_types=_alternating,
    scales_embedding=True,
)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        defaults={"attention_bias": False, "mlp_bias": False},
        fixed={"pretraining_tp": (1, None), "sliding_window": (None,)},
        inert=frozenset({"is_llama_config"}),
    ),
    "mistral": Family(
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        layer_types=_all_sliding,
    ),
    "qwen2": Family(
        defaults=_QWEN2,
        fixed={"use_mrope": (False,)},
        qkv_bias=True,
        layer_types=_sliding_from_boundary,
    ),
    "qwen3": Family(
        defaults={**_QWEN2, "head_dim": 128, "attention_bias": False},
        query_key_norm="head",
        layer_types=_sliding_from_boundary,
    ),
    "smollm3": Family(
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "sliding_window": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "layer_types": None,
            "attention_bias": False,
            "mlp_bias": False,
        },
        # The published model has both; its network reads neither.
        inert=frozenset({"max_window_layers", "pretraining_tp"}),
        layer_types=_sliding_without_rope,
    ),
    "granite": Family(
        defaults={
            "attention_bias": False,
            "mlp_bias": False,
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
        },
    ),
    "phi3": Family(
        defaults={
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "partial_rotary_factor": 1.0,
        },
        fixed={
            **{"resid_pdrop": (0, 0.0), "embd_pdrop": (0, 0.0), "attention_bias": (False,)},
            **{"mlp_bias": (False,), "lm_head_bias": (False,)},
            **{"full_attn_mod": (1,), "interpolate_factor": (1,)},
        },
        # Of use to a rotary scaling that is refused.
        inert=frozenset({"original_max_position_embeddings"}),
        fused={
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        },
        layer_types=_all_sliding,
    ),
    "olmo2": Family(
        defaults={"rms_norm_eps": 1e-5, "attention_bias": False},
        norms={
            "attention_output_norm": "post_attention_layernorm",
            "mlp_output_norm": "post_feedforward_layernorm",
        },
        query_key_norm="projection",
        norm_in_float32=True,
    ),
    "gemma2": _GEMMA2,
    "gemma3_text": dataclasses.replace(
        _GEMMA2,
        defaults={
            **_GEMMA,
            "max_position_embeddings": 131072,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": None,
            "sliding_window_pattern": 6,
        },
        fixed={**_GEMMA2.fixed, "attn_logit_softcapping": (None,)},
        # Written beside `layer_types`, which holds.
        inert=_GEMMA2.inert | {"_sliding_window_pattern"},
        query_key_norm="head",
        layer_types=_full_once_a_period,
        has_local_rope=True,
    ),
}
