"""In what the layers of one network differ beside their weights, and how that grows."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from opt_deus_jax.errors import UserError
from opt_deus_jax.models.families import FULL, SLIDING, Family, Fields, rope_layers

# A field per layer: what transformers reads before any pattern.
_TYPES, _HAS_ROPE = "layer_types", "no_rope_layers"
# The number of layers below the first with a window; ignored where `layer_types` stands.
_FIRST_SLIDING = "max_window_layers"
# A period, which no longer holds when layers have been put in between.
_PERIODS = (
    *("sliding_window_pattern", "_sliding_window_pattern", "no_rope_layer_interval"),
    "decoder_sparse_step",
)
# The layers that have one MLP where others have experts.
_DENSE = "mlp_only_layers"


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What a layer computes differently from another one.

    Attributes:
        window: How many tokens a token sees, itself and those before it; None for all of them.
        rope: Which of `ModelConfig.ropes` rotates queries and keys; None for none.
        has_experts: Whether it has a mixture of experts in place of one MLP.
    """

    window: int | None = None
    rope: int | None = 0
    has_experts: bool = False


def read_layer_kinds(fields: Fields, family: Family, where: str) -> tuple[LayerKind, ...]:
    """Finds the kind of every layer.

    Args:
        fields: Those of config.json, and the defaults of those it has not.
        family: The architecture.
        where: What error messages call the config.

    Returns:
        One kind for each layer, from the bottom up.

    Raises:
        UserError: A field is of the wrong type or length, or contradicts another.
    """
    num_layers = fields["num_hidden_layers"]
    _check_counts(fields, where)
    _check_rope_layers(fields, where)
    types = fields.get(_TYPES)
    types = family.layer_types(fields) if types is None else types
    if not isinstance(types, Sequence) or len(types) != num_layers:
        raise UserError(
            f"{where}: field {_TYPES}={types!r} must be a list with an entry for each of the "
            f"{num_layers} layers"
        )
    unknown = [name for name in types if name not in (FULL, SLIDING)]
    if unknown:
        raise UserError(
            f"{where}: field {_TYPES} has {unknown[0]!r}, which is not supported; supported: "
            f"{FULL}, {SLIDING}"
        )
    window = fields.get("sliding_window")
    if SLIDING in types and (window is None or not fields.get("use_sliding_window", True)):
        raise UserError(
            f"{where}: field sliding_window={window!r} with use_sliding_window="
            f"{fields.get('use_sliding_window')!r}: {_TYPES} has {SLIDING}; give its window"
        )
    has_rope = rope_layers(fields) if _HAS_ROPE in fields else (1,) * num_layers
    return tuple(
        LayerKind(
            window if kind == SLIDING else None,
            (int(family.has_local_rope and kind == SLIDING)) if rotates else None,
            has_experts,
        )
        for kind, rotates, has_experts in zip(
            types, has_rope, _expert_layers(fields, family, where), strict=True
        )
    )


def _expert_layers(fields: Fields, family: Family, where: str) -> list[bool]:
    num_layers = fields["num_hidden_layers"]
    dense: Any = fields.get(_DENSE) or ()
    period = fields.get("decoder_sparse_step") or 1
    if not isinstance(dense, list | tuple) or any(
        depth not in range(num_layers) for depth in dense
    ):
        raise UserError(
            f"{where}: field {_DENSE}={dense!r} must be a list of depths from 0 to {num_layers - 1}"
        )
    return [
        family.experts is not None and depth not in dense and (depth + 1) % period == 0
        for depth in range(num_layers)
    ]


def _check_counts(fields: Fields, where: str) -> None:
    for key in ("sliding_window", _FIRST_SLIDING, *_PERIODS):
        value = fields.get(key)
        is_count = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (is_count and value >= (key != _FIRST_SLIDING)):
            raise UserError(f"{where}: field {key}={value!r} must be a positive integer or null")


def _check_rope_layers(fields: Fields, where: str) -> None:
    given, num_layers = fields.get(_HAS_ROPE), fields["num_hidden_layers"]
    if given is None:
        return
    is_list = isinstance(given, Sequence) and len(given) >= num_layers
    if not is_list or any(entry not in (0, 1) for entry in given):
        raise UserError(
            f"{where}: field {_HAS_ROPE}={given!r} must be a list of 1 (rotated) and 0 for each of "
            f"the {num_layers} layers"
        )


def grown_layer_fields(
    hf_config: Mapping[str, Any],
    family: Family,
    kinds: Sequence[LayerKind],
    parents: Sequence[int],
) -> dict[str, Any]:
    """Rewrites the fields of a config.json that say which layer is of which kind.

    An architecture whose layers may differ gets them written out one by one: a period or a
    boundary does not survive layers that are put in between.

    Args:
        hf_config: The base's config.json.
        family: Its architecture.
        kinds: The kind of each of its layers.
        parents: For each layer of the grown model, the base layer whose kind it has.

    Returns:
        A new config.json.
    """
    grown = {key: value for key, value in hf_config.items() if key not in _PERIODS}
    grown["num_hidden_layers"] = len(parents)
    if hf_config.get(_FIRST_SLIDING) is not None:
        first = hf_config[_FIRST_SLIDING]
        above = max(first - len(kinds), 0)
        grown[_FIRST_SLIDING] = sum(parent < first for parent in parents) + above
    if _TYPES in family.defaults:
        grown[_TYPES] = [FULL if kinds[p].window is None else SLIDING for p in parents]
    if _DENSE in family.defaults:
        grown[_DENSE] = [d for d, parent in enumerate(parents) if not kinds[parent].has_experts]
    if _HAS_ROPE in family.defaults:
        grown[_HAS_ROPE] = [int(kinds[parent].rope is not None) for parent in parents]
    return grown
