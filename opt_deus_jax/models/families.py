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
class ExpertNames:
    """What checkpoints call a mixture of experts, a `*` for the number of an expert.

    Attributes:
        router: What scores the experts.
        gate: An expert's kernels, as are the others.
        width_field: The field of config.json that gives the neurons of an expert.
    """

    router: str
    gate: str
    up: str
    down: str
    width_field: str


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
        experts: Names of a mixture of experts, where layers may have one in place of their MLP.
        activation_field: The field that names the MLP's activation.
        layer_types: Types of the layers where config.json has no `layer_types`.
        rope_kinds: The rotary embeddings that it may have, by their `rope_type`.
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
    experts: ExpertNames | None = None
    activation_field: str = "hidden_act"
    layer_types: Callable[[Fields], Sequence[str]] = _all_full
    rope_kinds: Sequence[str] = ("default", "linear", "llama3", "yarn")
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


def _all_sliding_if_used(fields: Fields) -> Sequence[str]:
    return _all_sliding(
        {**fields, "sliding_window": None} if not fields["use_sliding_window"] else fields
    )


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


_EXPERTS: Fields = {
    "num_local_experts": None,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
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
    # Published configs have a second name of the activation and of the window; neither is read.
    inert=frozenset({"cache_implementation", "hidden_act", "sliding_window_size"}),
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
    "mixtral": Family(
        defaults={
            **_EXPERTS,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "num_local_experts": 8,
        },
        fixed={"router_jitter_noise": (0.0, None)},
        layer_types=_all_sliding,
        experts=ExpertNames(
            router="block_sparse_moe.gate",
            gate="block_sparse_moe.experts.*.w1",
            up="block_sparse_moe.experts.*.w3",
            down="block_sparse_moe.experts.*.w2",
            width_field="intermediate_size",
        ),
    ),
    "qwen3_moe": Family(
        defaults={
            **_EXPERTS,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            # transformers 5 writes the number as `num_local_experts`.
            "num_experts": None,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "mlp_only_layers": None,
            "decoder_sparse_step": 1,
        },
        # Published configs have it; the network has a window in all layers or in none.
        inert=frozenset({"max_window_layers"}),
        query_key_norm="head",
        layer_types=_all_sliding_if_used,
        experts=ExpertNames(
            router="mlp.gate",
            gate="mlp.experts.*.gate_proj",
            up="mlp.experts.*.up_proj",
            down="mlp.experts.*.down_proj",
            width_field="moe_intermediate_size",
        ),
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
        # To transformers every scaling of a Phi-3 is longrope.
        rope_kinds=("default",),
        # Of use to that alone.
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
