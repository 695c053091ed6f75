"""The training step of an experiment, lowered for devices without weights or data."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opt_deus_jax.config import Experiment
from opt_deus_jax.distributed.mesh import make_mesh
from opt_deus_jax.models.accounting import count_costs
from opt_deus_jax.models.attention import check_attention
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.training.optimizer import learning_rate_schedule, make_optimizer
from opt_deus_jax.training.placement import (
    Placement,
    abstract_params,
    check_fits,
    param_shardings,
    place,
)
from opt_deus_jax.training.segments import (
    TrainedNames,
    invert_mask,
    partition,
    plan_segments,
    trained_mask,
)
from opt_deus_jax.training.settings import check_training, resolve_steps
from opt_deus_jax.training.step import TrainState, make_train_step


class LoweredStep(NamedTuple):
    """A step that can be compiled.

    Attributes:
        lowered: What `compile` is called on.
        arguments: Shape, dtype and sharding of all that it is given.
        tokens: Tokens a step.
        model_flops: FLOPs a step that training cannot do without.
    """

    lowered: jax.stages.Lowered
    arguments: Any
    tokens: int
    model_flops: int


def _abstract_batch(experiment: Experiment, placement: Placement) -> dict[str, Any]:
    shape = (experiment.training.batch_size, experiment.data.sequence_length + 1)

    def column(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placement.rows)

    batch = {"tokens": column(jnp.int32)}
    if experiment.data.format != "text":
        batch |= {"example": column(jnp.int32), "is_answer": column(jnp.bool_)}
    return batch


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def lower_train_step(
    experiment: Experiment,
    config: ModelConfig,
    trained: TrainedNames,
    devices: Sequence[Any],
) -> LoweredStep:
    """Lowers the step that `train` would run.

    Args:
        experiment: Its data, optimizer, mesh and training are used; where it counts epochs, a
            step's place in the learning rate's schedule does not change what is compiled.
        config: The network.
        trained: Its parameters that are trained.
        devices: To compile for; they need not exist.

    Returns:
        The step.

    Raises:
        UserError: A setting is out of range, or mesh, batch and network do not fit each other.
    """
    training = resolve_steps(experiment.training, experiment.training.batch_size)
    check_training(training)
    check_attention(
        training.attention,
        platform=devices[0].platform,
        compute_dtype=training.compute_dtype,
        packed=experiment.data.format != "text" and experiment.data.packing,
        head_dim=config.head_dim,
    )
    mesh = make_mesh(experiment.mesh, devices)
    check_fits(config, training, mesh)
    segments = plan_segments(trained.blocks)
    mask = trained_mask(config, segments, trained.outer)
    schedule = learning_rate_schedule(experiment.optimizer, training.steps)
    optimizer = make_optimizer(experiment.optimizer, schedule)
    placement = place(config, segments, mask, optimizer, mesh)

    def abstract(dtype: Any) -> Any:
        shardings = param_shardings(config, segments, mesh)
        return abstract_params(config, segments, np.dtype(dtype), shardings)

    trainable, _ = partition(abstract(np.float32), mask)
    frozen, _ = partition(abstract(jnp.dtype(training.frozen_dtype)), invert_mask(mask))
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=placement.scalar),  # pyright: ignore
        trainable,
        _with_shardings(jax.eval_shape(optimizer.init, trainable), placement.optimizer_state),
    )
    arguments = (state, frozen, _abstract_batch(experiment, placement))
    with jax.set_mesh(mesh):
        step: Any = make_train_step(config, training, optimizer, schedule, placement)
        lowered = step.lower(*arguments)
    tokens = training.batch_size * experiment.data.sequence_length
    costs = count_costs(
        config,
        trained.outer,
        trained.blocks,
        sequence_length=experiment.data.sequence_length,
        frozen_bytes=jnp.dtype(training.frozen_dtype).itemsize,
    )
    return LoweredStep(lowered, arguments, tokens, tokens * costs.model_flops)
