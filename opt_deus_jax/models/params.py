"""The one table of parameters: it drives initialisation, import, export, sharding and counts."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from opt_deus_jax.models.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter of the network.

    Attributes:
        shape: Kernels are [out, in], as checkpoints store them.
        logical_axes: A name for each axis, to be mapped to mesh axes.
        hf_name: The tensor's Hugging Face name, with `{layer}` for block parameters.
        init: How a fresh one is drawn.
    """

    shape: tuple[int, ...]
    logical_axes: tuple[str, ...]
    hf_name: str
    init: Literal["normal", "ones", "zeros"]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


# Kernels whose zeros make a residual block the identity.
OUTPUT_KERNELS = ("output_kernel", "down_kernel")
OUTPUT_BIASES = ("output_bias", "down_bias")


def block_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """The parameters of one decoder block, by their name in the Flax module.

    Args:
        config: The network.

    Returns:
        Specs in the order in which the block uses them.
    """
    width, mlp = config.width, config.mlp_width
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    kernels = (
        ("query", "self_attn.q_proj", heads, width, "heads", "width", config.attention_bias),
        ("key", "self_attn.k_proj", kv_heads, width, "kv_heads", "width", config.attention_bias),
        ("value", "self_attn.v_proj", kv_heads, width, "kv_heads", "width", config.attention_bias),
        ("output", "self_attn.o_proj", width, heads, "width", "heads", config.attention_bias),
        ("gate", "mlp.gate_proj", mlp, width, "mlp", "width", config.mlp_bias),
        ("up", "mlp.up_proj", mlp, width, "mlp", "width", config.mlp_bias),
        ("down", "mlp.down_proj", width, mlp, "width", "mlp", config.mlp_bias),
    )
    prefix = "model.layers.{layer}."
    specs = {
        name: ParamSpec((width,), ("width",), f"{prefix}{hf_name}.weight", "ones")
        for name, hf_name in (
            ("input_norm", "input_layernorm"),
            ("post_attention_norm", "post_attention_layernorm"),
        )
    }
    for name, hf_name, rows, columns, row_axis, column_axis, has_bias in kernels:
        specs[f"{name}_kernel"] = ParamSpec(
            (rows, columns), (row_axis, column_axis), f"{prefix}{hf_name}.weight", "normal"
        )
        if has_bias:
            specs[f"{name}_bias"] = ParamSpec(
                (rows,), (row_axis,), f"{prefix}{hf_name}.bias", "zeros"
            )
    return specs


def outer_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """The parameters outside the blocks: embedding, final norm and, where untied, the head.

    Args:
        config: The network.

    Returns:
        Specs by their name in the param pytree.
    """
    vocabulary = ((config.vocabulary_size, config.width), ("vocabulary", "width"))
    specs = {
        "embedding": ParamSpec(*vocabulary, "model.embed_tokens.weight", "normal"),
        "final_norm": ParamSpec((config.width,), ("width",), "model.norm.weight", "ones"),
    }
    if not config.tied_embeddings:
        specs["head"] = ParamSpec(*vocabulary, "lm_head.weight", "normal")
    return specs


def named_tensors(config: ModelConfig, num_layers: int) -> Iterator[tuple[str, ParamSpec]]:
    """Every tensor of a checkpoint by its Hugging Face name, in the order of the forward pass.

    Args:
        config: The network.
        num_layers: Its depth.

    Yields:
        (Hugging Face name, spec).
    """
    outer = outer_specs(config)
    yield outer["embedding"].hf_name, outer["embedding"]
    for layer in range(num_layers):
        for spec in block_specs(config).values():
            yield spec.hf_name.format(layer=layer), spec
    for name, spec in outer.items():
        if name != "embedding":
            yield spec.hf_name, spec


def block_size(config: ModelConfig) -> int:
    """Number of parameters of one block."""
    return sum(spec.size for spec in block_specs(config).values())


def outer_size(config: ModelConfig) -> int:
    """Number of parameters outside the blocks."""
    return sum(spec.size for spec in outer_specs(config).values())
