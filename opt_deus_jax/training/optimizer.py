"""AdamW and its learning-rate schedules."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from opt_deus_jax.config import OptimizerConfig
from opt_deus_jax.errors import UserError

# Share of the peak at which the cosine schedule ends.
_COSINE_FLOOR = 0.1


def learning_rate_schedule(optimizer: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of each update, counted from 0.

    Warm-up rises linearly and reaches the peak at update `warmup_steps - 1`, so that no update is
    lost to a rate of zero. `wsd` then stays and falls linearly over the last `decay_fraction` of
    all updates, to zero at update `steps` (which is not made). `cosine` falls to a tenth of the
    peak at the last update.

    Args:
        optimizer: The settings.
        steps: Number of updates.

    Returns:
        A function from the number of updates made (int or int32 array) to a float32 scalar.

    Raises:
        UserError: The parts of the schedule do not fit into `steps`, or are negative.
    """
    warmup, peak = optimizer.warmup_steps, optimizer.learning_rate
    decay = round(optimizer.decay_fraction * steps) if optimizer.schedule == "wsd" else 0
    if warmup < 0:
        raise UserError(f"config field optimizer.warmup_steps={warmup}: use 0 or more")
    if not 0 <= optimizer.decay_fraction <= 1:
        raise UserError(
            f"config field optimizer.decay_fraction={optimizer.decay_fraction}: use 0 to 1"
        )
    if warmup + decay > steps:
        raise UserError(
            f"config field optimizer.warmup_steps={warmup}: with {decay} steps of decay it "
            f"exceeds training.steps={steps}; lower it or optimizer.decay_fraction"
        )

    def schedule(count: Any) -> jax.Array:
        done = jnp.asarray(count, jnp.float32)
        rise = jnp.minimum(1.0, (done + 1) / max(warmup, 1))
        if optimizer.schedule == "wsd":
            return peak * rise * jnp.clip((steps - done) / max(decay, 1), 0.0, 1.0)
        progress = jnp.clip((done - warmup) / max(steps - 1 - warmup, 1), 0.0, 1.0)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return peak * rise * (_COSINE_FLOOR + (1 - _COSINE_FLOOR) * cosine)

    return schedule


def decay_mask(params: Any) -> Any:
    """Says which parameters decay: kernels, embedding and head, but no norm and no bias.

    Args:
        params: A param pytree, with or without None holes.

    Returns:
        A tree of bools with its structure.
    """

    def is_kernel(path: tuple, _: Any) -> bool:
        name = path[-1].key
        return name.endswith("_kernel") or name in ("embedding", "head")

    return jax.tree_util.tree_map_with_path(is_kernel, params)


def make_optimizer(
    optimizer: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101).

    Args:
        optimizer: The settings.
        schedule: From `learning_rate_schedule`.

    Returns:
        A transformation whose state has leaves only for the leaves of the params.

    Raises:
        UserError: A setting is out of its range.
    """
    for name in ("learning_rate", "epsilon", "clip_norm"):
        if not getattr(optimizer, name) > 0:
            raise UserError(
                f"config field optimizer.{name}={getattr(optimizer, name)}: use a positive number"
            )
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            raise UserError(
                f"config field optimizer.{name}={getattr(optimizer, name)}: use 0 or more, below 1"
            )
    if not optimizer.weight_decay >= 0:
        raise UserError(
            f"config field optimizer.weight_decay={optimizer.weight_decay}: use 0 or more"
        )
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.scale_by_adam(optimizer.beta1, optimizer.beta2, optimizer.epsilon),
        optax.add_decayed_weights(optimizer.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )
