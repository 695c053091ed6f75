"""The loss and its gradients as a jaxpr, without a parameter in memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from opt_deus_jax.config import TrainingConfig
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.params import outer_specs
from opt_deus_jax.training.segments import (
    TrainedNames,
    partition,
    pattern_specs,
    plan_segments,
    trained_mask,
)
from opt_deus_jax.training.step import loss_fn


def abstract(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def gradient_jaxpr(
    config: ModelConfig, names: TrainedNames, training: TrainingConfig, batch: int, length: int
) -> Any:
    """What `jax.value_and_grad(loss_fn)` computes for a batch of text."""
    segments = plan_segments(names.blocks, config.kinds_of(len(names.blocks)))
    params: dict[str, Any] = {k: abstract(spec.shape) for k, spec in outer_specs(config).items()}
    params["segments"] = [
        [{k: abstract((segment.repeats, *s.shape)) for k, s in specs.items()} for specs in pattern]
        for segment, pattern in zip(segments, pattern_specs(config, segments), strict=True)
    ]
    trainable, frozen = partition(params, trained_mask(config, segments, names.outer))
    tokens = {"tokens": jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)}
    loss = functools.partial(loss_fn, config=config, training=training)
    weights = abstract((batch, length))
    return jax.make_jaxpr(jax.value_and_grad(loss))(trainable, frozen, tokens, weights).jaxpr
