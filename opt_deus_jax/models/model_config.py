"""The network's hyper-parameters, read from a Hugging Face config.json and nothing else."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from opt_deus_jax.errors import UserError
from opt_deus_jax.models.expert_config import ExpertConfig, read_experts
from opt_deus_jax.models.families import FAMILIES, FULL, INERT, SIZES, SLIDING, Family, Fields
from opt_deus_jax.models.layer_kinds import LayerKind, grown_layer_fields, read_layer_kinds
from opt_deus_jax.models.rope import RopeConfig, is_number, read_rope

# Activations of the MLP by transformers' names.
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
# Fields that may be absent for an architecture, with what then holds.
_FACTORS = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar")


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """Root-mean-square norms.

    Attributes:
        epsilon: Added to the mean square.
        offset: Added to the stored scale.
        in_float32: Whether the scale is applied before the result is rounded to the compute dtype.
    """

    epsilon: float
    offset: float = 0.0
    in_float32: bool = False


@dataclasses.dataclass(frozen=True)
class LogitsConfig:
    """What is done to the products with the head.

    Attributes:
        divisor: They are divided by it.
        soft_cap: Then c tanh(x / c) is taken, where this c is not None.
    """

    divisor: float = 1.0
    soft_cap: float | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a network. Hashable, so it can be a static argument of jit.

    Attributes:
        family: Its row of `FAMILIES`.
        mlp_width: Neurons of the MLP of a layer without experts.
        experts: Those of the layers that have them; None for an architecture without.
        layer_kinds: For each layer from the bottom up.
        ropes: The rotary embeddings that its layers choose from.
        attention_scale: What products of queries and keys are multiplied by.
        attention_soft_cap: Then c tanh(x / c) is taken, where this c is not None.
        embedding_multiplier: What the embedded tokens are multiplied by.
        residual_multiplier: What attention and MLP are multiplied by before they are added.
    """

    family: str
    vocabulary_size: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    experts: ExpertConfig | None
    layer_kinds: tuple[LayerKind, ...]
    ropes: tuple[RopeConfig, ...]
    norm: NormConfig
    activation: str
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    attention_scale: float
    attention_soft_cap: float | None
    embedding_multiplier: float
    residual_multiplier: float
    logits: LogitsConfig
    initializer_range: float

    @property
    def num_layers(self) -> int:
        """The depth."""
        return len(self.layer_kinds)

    @property
    def facts(self) -> Family:
        """What the architecture always has."""
        return FAMILIES[self.family]

    def of_layer(self, layer: int) -> "ModelConfig":
        """The network of this layer alone, whose blocks are all of its kind."""
        return dataclasses.replace(self, layer_kinds=(self.layer_kinds[layer],))

    def kinds_of(self, num_layers: int) -> tuple[LayerKind, ...]:
        """The kinds of the layers of this network at its own depth, or at another if all are alike.

        Args:
            num_layers: A depth.

        Returns:
            One kind for each layer.

        Raises:
            ValueError: The layers differ, and the depth is another one.
        """
        if num_layers == self.num_layers:
            return self.layer_kinds
        if len(set(self.layer_kinds)) != 1:
            raise ValueError(f"{num_layers} layers, but the config has {self.num_layers} kinds")
        return self.layer_kinds[:1] * num_layers


def _known_fields(hf_config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields that are honoured, with the defaults of those that are absent."""
    model_type: Any = hf_config.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(
            f"{where}: architecture model_type={model_type!r} is not supported; supported: "
            f"{', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    fixed, defaults = family.all_fixed, family.all_defaults
    for key, value in hf_config.items():
        if key in fixed:
            if value not in fixed[key]:
                raise UserError(
                    f"{where}: field {key}={value!r} is not supported; it must be {fixed[key][0]!r}"
                )
        elif key not in (*SIZES, *defaults, *family.inert) and key not in INERT:
            raise UserError(
                f"{where}: unknown field {key}={value!r}; remove it if it does not change what "
                "the network computes"
            )
    return {**defaults, **hf_config}


def _check_numbers(fields: Fields, where: str) -> None:
    for key in SIZES:
        value = fields.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}: field {key}={value!r} must be a positive integer")
    for key in ("num_key_value_heads", "head_dim", "max_position_embeddings"):
        if not isinstance(fields[key], int | None):
            raise UserError(f"{where}: field {key}={fields[key]!r} must be an integer")
    for key in ("rms_norm_eps", "initializer_range", *_FACTORS):
        if not is_number(fields.get(key, 1.0)):
            raise UserError(f"{where}: field {key}={fields[key]!r} must be a number")
    for key in ("rms_norm_eps", "logits_scaling", *_CAPS):
        value = fields.get(key)
        if value is not None and not (is_number(value) and math.isfinite(value) and value > 0):
            raise UserError(f"{where}: field {key}={value!r} must be positive")


def _read_sizes(fields: Fields, where: str) -> tuple[int, int, int]:
    """Heads, KV heads and head size, once every number in the config is known to be sound."""
    _check_numbers(fields, where)
    num_heads = fields["num_attention_heads"]
    num_kv_heads = fields["num_key_value_heads"] or num_heads
    head_dim = fields["head_dim"] or fields["hidden_size"] // num_heads
    if not fields["head_dim"] and fields["hidden_size"] % num_heads:
        raise UserError(
            f"{where}: hidden_size={fields['hidden_size']} is not a multiple of "
            f"num_attention_heads={num_heads}; add head_dim"
        )
    if num_heads % num_kv_heads:
        raise UserError(
            f"{where}: num_attention_heads={num_heads} is not a multiple of "
            f"num_key_value_heads={num_kv_heads}"
        )
    if head_dim % 2:
        raise UserError(f"{where}: head_dim={head_dim} must be even for rotary embeddings")
    return num_heads, num_kv_heads, head_dim


def _read_ropes(fields: Fields, head_dim: int, where: str) -> tuple[RopeConfig, ...]:
    read = functools.partial(
        read_rope,
        kinds=FAMILIES[fields["model_type"]].rope_kinds,
        max_positions=int(fields["max_position_embeddings"]),
        where=where,
    )
    # transformers 5 writes one `rope_parameters`; before it, `rope_theta` and `rope_scaling`.
    given = fields["rope_parameters"]
    if "rope_local_base_freq" in fields:
        if given is not None and not (isinstance(given, Mapping) and set(given) <= {FULL, SLIDING}):
            raise UserError(
                f"{where}: field rope_parameters={given!r} must have an object for each of {FULL} "
                f"and {SLIDING}"
            )
        given = given or {FULL: fields["rope_scaling"]}
        return (
            read(given.get(FULL), fields["rope_theta"]),
            read(given.get(SLIDING), fields["rope_local_base_freq"]),
        )
    fraction = fields.get("partial_rotary_factor")
    rope = read(given or fields["rope_scaling"], fields["rope_theta"], fraction=fraction)
    if int(head_dim * rope.fraction) % 2 or not 0 < rope.fraction <= 1:
        raise UserError(
            f"{where}: field partial_rotary_factor={rope.fraction} must leave an even number of "
            f"the {head_dim} dimensions of a head"
        )
    return (rope,)


def _read_activation(fields: Fields, family: Family, where: str) -> str:
    activation = fields[family.activation_field]
    if activation not in ACTIVATIONS:
        raise UserError(
            f"{where}: field {family.activation_field}={activation!r} is not supported; it must "
            f"be one of {', '.join(ACTIVATIONS)}"
        )
    return activation


def _attention_scale(fields: Fields, head_dim: int) -> float:
    if "attention_multiplier" in fields:
        return float(fields["attention_multiplier"])
    return float(fields.get("query_pre_attn_scalar", head_dim)) ** -0.5


def _cap(fields: Fields, key: str) -> float | None:
    return None if fields.get(key) is None else float(fields[key])


def read_model_config(hf_config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Translates a Hugging Face config of one of the `FAMILIES`.

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
    fields = _known_fields(hf_config, where)
    family = FAMILIES[fields["model_type"]]
    num_heads, num_kv_heads, head_dim = _read_sizes(fields, where)
    attention_bias = bool(fields.get("attention_bias", False))
    width = fields["hidden_size"]
    return ModelConfig(
        family=fields["model_type"],
        vocabulary_size=fields["vocab_size"],
        width=width,
        mlp_width=fields["intermediate_size"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=int(fields["max_position_embeddings"]),
        experts=read_experts(fields, family, where),
        layer_kinds=read_layer_kinds(fields, family, where),
        ropes=_read_ropes(fields, head_dim, where),
        norm=NormConfig(float(fields["rms_norm_eps"]), family.norm_offset, family.norm_in_float32),
        activation=_read_activation(fields, family, where),
        tied_embeddings=bool(fields["tie_word_embeddings"]),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.output_bias is None else family.output_bias,
        mlp_bias=bool(fields.get("mlp_bias", False)),
        attention_scale=_attention_scale(fields, head_dim),
        attention_soft_cap=_cap(fields, "attn_logit_softcapping"),
        embedding_multiplier=(
            width**0.5
            if family.scales_embedding
            else float(fields.get("embedding_multiplier", 1.0))
        ),
        residual_multiplier=float(fields.get("residual_multiplier", 1.0)),
        logits=LogitsConfig(
            float(fields.get("logits_scaling", 1.0)), _cap(fields, "final_logit_softcapping")
        ),
        initializer_range=float(fields["initializer_range"]),
    )


def grown_hf_config(hf_config: Mapping[str, Any], parents: Sequence[int]) -> dict[str, Any]:
    """Rewrites every field that depends on depth.

    Args:
        hf_config: The base's config.json; `read_model_config` refuses every field that it does not
            know, so no per-layer field can slip through.
        parents: For each layer of the grown model, the base layer whose kind it has.

    Returns:
        A new config.json.

    Raises:
        UserError: The base's is not supported.
        ValueError: The architecture cannot say that its layers are of these kinds.
    """
    base = read_model_config(hf_config)
    if list(parents) == list(range(base.num_layers)):
        return dict(hf_config)
    grown = grown_layer_fields(hf_config, base.facts, base.layer_kinds, parents)
    wanted = tuple(base.layer_kinds[parent] for parent in parents)
    if read_model_config(grown).layer_kinds != wanted:
        raise ValueError(f"the config of a {base.family} cannot describe layers {wanted}")
    return grown
