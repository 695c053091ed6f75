"""The one table of parameters: it drives initialisation, import, export, sharding and counts."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from opt_deus_jax.models.layer_kinds import LayerKind
from opt_deus_jax.models.model_config import ModelConfig

_LAYER = "model.layers.{layer}."
_OUTPUTS = ("output_kernel", "output_bias", "down_kernel", "down_bias", "experts_down_kernel")
_OUTPUT_NORMS = ("attention_output_norm", "mlp_output_norm")


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter of the network.

    Attributes:
        shape: Kernels are [out, in], as checkpoints store them.
        logical_axes: A name for each axis, to be mapped to mesh axes.
        hf_name: The tensor's Hugging Face name, with `{layer}` for block parameters; Llama's where
            an architecture stores several kernels as one. With a `*`, checkpoints have a tensor
            for each entry of the first axis, named with its number.
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


def identity_values(config: ModelConfig) -> dict[str, float]:
    """What makes a block the identity: the parameters that end its residual branches, all alike.

    They are zeroed where the branch ends with them. Where a norm follows, its scale is: the
    gradient of a norm at zero, 1 / sqrt(epsilon), is no step to begin with.

    Args:
        config: A network whose layers all have the same parameters.

    Returns:
        The value of each of those parameters, by its name in the Flax module.
    """
    specs = block_specs(config)
    names = [name for name in specs if name in _OUTPUT_NORMS]
    if names:
        return dict.fromkeys(names, 0.0 - config.norm.offset)
    return dict.fromkeys((name for name in specs if name in _OUTPUTS), 0.0)


def block_specs(config: ModelConfig, kind: LayerKind | None = None) -> dict[str, ParamSpec]:
    """The parameters of one decoder block, by their name in the Flax module.

    Args:
        config: The network.
        kind: That of the layer; None for a network whose layers all have the same parameters.

    Returns:
        Specs in the order in which the block uses them, its norms first.

    Raises:
        ValueError: No kind is given, and some layers have experts, others not.
    """
    has_experts = _all_have_experts(config) if kind is None else kind.has_experts
    width, mlp, facts = config.width, config.mlp_width, config.facts
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    kernels = (
        ("query", "self_attn.q_proj", heads, width, "heads", "width", config.qkv_bias),
        ("key", "self_attn.k_proj", kv_heads, width, "kv_heads", "width", config.qkv_bias),
        ("value", "self_attn.v_proj", kv_heads, width, "kv_heads", "width", config.qkv_bias),
        ("output", "self_attn.o_proj", width, heads, "width", "heads", config.output_bias),
        ("gate", "mlp.gate_proj", mlp, width, "mlp", "width", config.mlp_bias),
        ("up", "mlp.up_proj", mlp, width, "mlp", "width", config.mlp_bias),
        ("down", "mlp.down_proj", width, mlp, "width", "mlp", config.mlp_bias),
    )
    specs = {
        name: _norm_spec(config, width, "width", f"{_LAYER}{hf_name}.weight")
        for name, hf_name in facts.norms.items()
    }
    for name, hf_name, rows, columns, row_axis, column_axis, has_bias in kernels:
        if has_experts and "mlp" in (row_axis, column_axis):
            continue
        specs[f"{name}_kernel"] = ParamSpec(
            (rows, columns), (row_axis, column_axis), f"{_LAYER}{hf_name}.weight", "normal"
        )
        if has_bias:
            specs[f"{name}_bias"] = ParamSpec(
                (rows,), (row_axis,), f"{_LAYER}{hf_name}.bias", "zeros"
            )
        if name in ("query", "key") and facts.query_key_norm != "none":
            size, axis = (rows, row_axis)
            if facts.query_key_norm == "head":
                size, axis = config.head_dim, "head_dim"
            norm_name = f"{_LAYER}self_attn.{name[0]}_norm.weight"
            specs[f"{name}_norm"] = _norm_spec(config, size, axis, norm_name)
    return specs | _expert_specs(config) if has_experts else specs


def _all_have_experts(config: ModelConfig) -> bool:
    having = {kind.has_experts for kind in config.layer_kinds}
    if len(having) != 1:
        raise ValueError("which parameters a block has depends on its layer: give its kind")
    return having.pop()


def _expert_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    experts, names = config.experts, config.facts.experts
    assert experts is not None
    assert names is not None
    number, inner, width = experts.number, experts.width, config.width
    rows = ((number, inner, width), ("expert", "expert_mlp", "width"))
    columns = ((number, width, inner), ("expert", "width", "expert_mlp"))

    def spec(shape: tuple[int, ...], axes: tuple[str, ...], name: str) -> ParamSpec:
        return ParamSpec(shape, axes, f"{_LAYER}{name}.weight", "normal")

    return {
        # Every device scores all experts.
        "router_kernel": spec((number, width), ("all_experts", "width"), names.router),
        "experts_gate_kernel": spec(*rows, names.gate),
        "experts_up_kernel": spec(*rows, names.up),
        "experts_down_kernel": spec(*columns, names.down),
    }


def _norm_spec(config: ModelConfig, size: int, axis: str, hf_name: str) -> ParamSpec:
    return ParamSpec((size,), (axis,), hf_name, "zeros" if config.norm.offset else "ones")


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
        "final_norm": _norm_spec(config, config.width, "width", "model.norm.weight"),
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
    for layer, kind in enumerate(config.kinds_of(num_layers)):
        for spec in block_specs(config, kind).values():
            yield spec.hf_name.format(layer=layer), spec
    for name, spec in outer.items():
        if name != "embedding":
            yield spec.hf_name, spec


def fused_names(config: ModelConfig, num_layers: int | None = None) -> dict[str, tuple[str, ...]]:
    """The tensors that a checkpoint stores as one, [a; b; ...].

    Args:
        config: The network.
        num_layers: Its depth, None for that of the config.

    Returns:
        Hugging Face names of the parts, which those of `named_tensors` are, by that of the whole.
    """
    depth = config.num_layers if num_layers is None else num_layers
    return {
        f"{_LAYER.format(layer=layer)}{whole}.weight": tuple(
            f"{_LAYER.format(layer=layer)}{part}.weight" for part in parts
        )
        for layer in range(depth)
        for whole, parts in config.facts.fused.items()
    }


def block_size(config: ModelConfig, kind: LayerKind) -> int:
    """Number of parameters of a block of a kind."""
    return sum(spec.size for spec in block_specs(config, kind).values())


def outer_size(config: ModelConfig) -> int:
    """Number of parameters outside the blocks."""
    return sum(spec.size for spec in outer_specs(config).values())
