"""The published methods and the controls, as presets over independent choices."""

import dataclasses
import math
from collections.abc import Sequence

from opt_deus_jax.checkpoints.manifest import Manifest
from opt_deus_jax.config import AS_PUBLISHED, UpscaleConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.upscaling.layout import LayerOrigin, parents_of, plan_layout


@dataclasses.dataclass(frozen=True)
class Method:
    """The choices that make a method.

    Attributes:
        layout: Where new layers go.
        weights: How a new layer is made from its parents: transport, average, copy_previous,
            copy_next, half_next, random or predicted; empty where no layer is fused.
        zero_init: Whether the kernels that end the residual branches start at zero.
        trained: `new`, `all` or a regular expression, as `upscale.trained`.
        output_scale: Without `zero_init`: a factor on those kernels.
    """

    layout: str
    weights: str
    zero_init: bool
    trained: str
    output_scale: float = 1.0


METHODS = {
    "opt_deus": Method("top", "transport", zero_init=True, trained="new"),
    "average": Method("top", "average", zero_init=False, trained="new"),
    "llama_pro": Method("uniform", "copy_previous", zero_init=True, trained="new"),
    "lesa": Method("top", "predicted", zero_init=False, trained="new"),
    "solar": Method("stack", "", zero_init=False, trained="all"),
    "base": Method("top", "", zero_init=False, trained="all"),
    "copy_previous": Method("top", "copy_previous", zero_init=True, trained="new"),
    "copy_next": Method("top", "copy_next", zero_init=True, trained="new"),
    "half_next": Method("top", "half_next", zero_init=True, trained="new"),
    "random": Method("top", "random", zero_init=True, trained="new"),
}


def resolve_method(config: UpscaleConfig) -> Method:
    """Takes the preset and replaces what the config sets.

    Args:
        config: The `upscale` part of an experiment.

    Returns:
        A method without `published` left in it.

    Raises:
        UserError: An unknown method, or choices that contradict each other.
    """
    if config.method not in METHODS:
        raise UserError(
            f"config field upscale.method={config.method!r}: use one of {', '.join(METHODS)}"
        )
    preset = METHODS[config.method]
    method = Method(
        layout=preset.layout if config.layout == AS_PUBLISHED else config.layout,
        weights=preset.weights,
        zero_init=_resolve_zero_init(config, preset),
        trained=preset.trained if config.trained == AS_PUBLISHED else config.trained,
        output_scale=config.output_scale or preset.output_scale,
    )
    if config.method == "base" and (config.num_new_layers or config.gaps):
        raise UserError(
            f"config field upscale.num_new_layers={config.num_new_layers}: method 'base' adds no "
            "layer; set it to 0"
        )
    if config.method != "base" and not (config.num_new_layers or config.gaps):
        raise UserError(
            f"config field upscale.num_new_layers=0: method {config.method!r} needs at least one"
        )
    if (method.layout == "stack") != (method.weights == "") and config.method != "base":
        raise UserError(
            f"config field upscale.layout={method.layout!r}: 'stack' goes with method 'solar' only"
        )
    if method.layout == "stack" and method.zero_init:
        raise UserError("config field upscale.zero_init=True: method 'solar' keeps its copies")
    _check_fusion(config, method)
    return method


def _resolve_zero_init(config: UpscaleConfig, preset: Method) -> bool:
    if config.output_scale is None:
        return preset.zero_init if config.zero_init is None else config.zero_init
    field = f"config field upscale.output_scale={config.output_scale}"
    if config.zero_init is not None:
        raise UserError(f"{field}: says what upscale.zero_init={config.zero_init} says; give one")
    if not preset.weights:
        raise UserError(f"{field}: method {config.method!r} makes no new weights; leave it at None")
    if not (math.isfinite(config.output_scale) and config.output_scale >= 0):
        raise UserError(f"{field}: must be 0 or a positive number")
    return config.output_scale == 0


def _check_fusion(config: UpscaleConfig, method: Method) -> None:
    symmetric = method.weights == "transport" and config.transport == "symmetric"
    if config.epsilon is not None and config.epsilon <= 0:
        raise UserError(f"config field upscale.epsilon={config.epsilon}: must be positive")
    field = f"config field upscale.fusion={config.fusion!r}"
    if config.fusion in ("matched", "select") and not symmetric:
        raise UserError(
            f"{field}: needs method 'opt_deus' with upscale.transport=symmetric, which says which "
            "neurons and heads belong together"
        )
    if config.fusion == "select" and config.epsilon is not None:
        raise UserError(
            f"{field}: takes whole neurons, upscale.epsilon={config.epsilon} averages them; leave "
            "epsilon at None"
        )
    if config.fusion != "mean" and method.weights not in ("transport", "average"):
        raise UserError(f"{field}: method {config.method!r} fuses nothing; use mean")
    if config.lesa_norms != "mean" and method.weights != "predicted":
        raise UserError(
            f"config field upscale.lesa_norms={config.lesa_norms!r}: goes with method 'lesa', not "
            f"{config.method!r}; leave it at mean"
        )


def layer_parents(method: Method, layers: Sequence[LayerOrigin]) -> tuple[int, ...]:
    """The base layer whose kind and dtype each layer of the grown model has.

    Args:
        method: How new layers are made.
        layers: From `plan_layers`.

    Returns:
        For a copy the layer that it is a copy of; for other new layers the one above, onto whose
        neurons transport moves those of the one below.
    """
    return parents_of(layers, prefer_previous=method.weights == "copy_previous")


def plan_layers(
    config: UpscaleConfig, num_layers: int, base: Manifest | None
) -> tuple[LayerOrigin, ...]:
    """Lists the layers of the grown model from the embedding up.

    Method `base` adds none: the layers that were new in a grown base stay its new ones.

    Args:
        config: The `upscale` part of an experiment.
        num_layers: Depth of the base.
        base: The manifest of the base, where the base is itself a grown model.

    Returns:
        One origin per layer.

    Raises:
        UserError: As `resolve_method` and `plan_layout`; or only new layers are to be trained and
            there is none; or the manifest is of another model.
    """
    method = resolve_method(config)
    layers = plan_layout(method.layout, num_layers, config.num_new_layers, config.gaps)
    if config.method != "base":
        return layers
    if base is not None:
        if len(base.is_new) != num_layers:
            raise UserError(
                f"config field base: its manifest lists {len(base.is_new)} layers, its config.json "
                f"{num_layers}; the two do not belong together, expand again"
            )
        layers = tuple(
            dataclasses.replace(layer, is_new=is_new)
            for layer, is_new in zip(layers, base.is_new, strict=True)
        )
    if method.trained == "new" and not any(layer.is_new for layer in layers):
        raise UserError("config field upscale.trained='new': method 'base' adds no layer; use all")
    return layers
