"""Small random models of every family, made by transformers, with all that is special in it."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.checkpoints.source import CheckpointSource
from tests.llama_checkpoints import source_of

_SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2},
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FULL, SLIDING = "full_attention", "sliding_attention"
# Two stacks of layers, so that little is compiled.
_TYPES = [FULL, FULL, SLIDING, SLIDING]
# By the name of a variant, which begins with the family's.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5, "head_dim": 16, "rms_norm_eps": 1e-3},
    "mistral yarn": {"sliding_window": None, "rope_parameters": _YARN | {"rope_theta": 1e4}},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {
        **{"layer_types": _TYPES, "use_sliding_window": True},
        **{"sliding_window": 6, "head_dim": 16, "attention_bias": True},
        "tie_word_embeddings": True,
    },
    "smollm3": {
        **{"no_rope_layers": [1, 1, 0, 0], "use_sliding_window": True, "sliding_window": 6},
        **{"attention_bias": True, "mlp_bias": True},
    },
    "granite": {
        **{"embedding_multiplier": 6.0, "residual_multiplier": 0.22, "logits_scaling": 1.7},
        **{"attention_multiplier": 0.4, "attention_bias": True, "tie_word_embeddings": True},
    },
    "phi3": {
        "sliding_window": 9,
        "rope_parameters": {
            "rope_theta": 1e4,
            "rope_type": "default",
            "partial_rotary_factor": 0.5,
        },
    },
    # The loss of the balance weighs enough to be seen.
    "mixtral": {
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7},
        **{"output_router_logits": True, "router_aux_loss_coef": 0.5},
    },
    "qwen3_moe": {
        **{"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20},
        **{"mlp_only_layers": [0], "head_dim": 16, "attention_bias": True},
    },
    "qwen3_moe normalised": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        **{"norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 6},
    },
    "olmo2": {"attention_bias": True, "rms_norm_eps": 1e-6},
    "gemma2": {
        **{"sliding_window": 5, "query_pre_attn_scalar": 24, "head_dim": 16},
        **{"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "layer_types": _TYPES},
    },
    "gemma3_text": {
        **{"sliding_window": 5, "query_pre_attn_scalar": 24, "head_dim": 16},
        **{"layer_types": _TYPES, "final_logit_softcapping": 3.0},
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            SLIDING: {"rope_type": "default", "rope_theta": 100.0},
        },
    },
}


@functools.cache
def oracle(variant: str) -> Any:
    """transformers' model with drawn weights, those of norms around what they begin with."""
    fields = {**_SIZES, **VARIANTS[variant]}
    config = transformers.AutoConfig.for_model(variant.split()[0], **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.15 * torch.randn(parameter.shape, generator=draw)
            parameter.copy_(parameter + noise if "norm" in name else noise)
    return model.eval()


def write(variant: str, directory: Path) -> CheckpointSource:
    """The same model, as transformers saves it and this project opens it."""
    oracle(variant).save_pretrained(directory)
    return open_checkpoint(str(directory))


@functools.cache
def base(variant: str) -> CheckpointSource:
    """The same, read into memory once."""
    with tempfile.TemporaryDirectory() as directory:
        source = write(variant, Path(directory))
        return source_of(source.hf_config, {name: source.read(name) for name in source.tensors})


def load(directory: Path) -> Any:
    """A directory as transformers loads it, nothing missing and nothing left over."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    model, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()
