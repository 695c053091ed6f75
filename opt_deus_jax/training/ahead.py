"""The training step of an experiment, lowered for devices without weights or data."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opt_deus_jax.config import Experiment
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.training.placement import Placement, abstract_params
from opt_deus_jax.training.program import make_program, program_costs
from opt_deus_jax.training.segments import TrainedNames, invert_mask, partition
from opt_deus_jax.training.settings import resolve_steps
from opt_deus_jax.training.step import TrainState


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
    experiment = dataclasses.replace(experiment, training=training)
    program = make_program(experiment, config, trained, devices)
    optimizer, placement = program.optimizer, program.placement

    def abstract(dtype: Any, mask: Any) -> Any:
        shardings = program.shardings
        return partition(abstract_params(config, program.segments, dtype, shardings), mask)[0]

    trainable = abstract(np.dtype(np.float32), program.mask)
    frozen = abstract(jnp.dtype(training.frozen_dtype), invert_mask(program.mask))
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=placement.scalar),  # pyright: ignore
        trainable,
        _with_shardings(jax.eval_shape(optimizer.init, trainable), placement.optimizer_state),
    )
    arguments = (state, frozen, _abstract_batch(experiment, placement))
    with jax.set_mesh(program.mesh):
        step: Any = program.train_step
        lowered = step.lower(*arguments)
    tokens = training.batch_size * experiment.data.sequence_length
    costs = program_costs(program, experiment.data.sequence_length)
    return LoweredStep(lowered, arguments, tokens, tokens * costs.model_flops)
