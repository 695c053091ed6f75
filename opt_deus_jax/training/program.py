"""A training on a mesh: how the network is cut, where everything lies, the compiled functions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from opt_deus_jax.config import Experiment, TrainingConfig
from opt_deus_jax.distributed.mesh import make_mesh
from opt_deus_jax.models.accounting import Costs, count_costs
from opt_deus_jax.models.attention import check_attention
from opt_deus_jax.models.language_model import Params
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.moe import check_experts
from opt_deus_jax.training.optimizer import learning_rate_schedule, make_optimizer
from opt_deus_jax.training.placement import Placement, check_fits, param_shardings, place
from opt_deus_jax.training.segments import Segment, TrainedNames, plan_segments, trained_mask
from opt_deus_jax.training.settings import check_training
from opt_deus_jax.training.step import (
    Evaluate,
    TrainStep,
    make_evaluation_loss,
    make_train_step,
)


class Program(NamedTuple):
    """What a training runs, without its arrays.

    Attributes:
        config: The network.
        training: The settings.
        trained: The trained parameters.
        mesh: The devices.
        segments: How the blocks are stacked.
        mask: From `trained_mask`.
        shardings: From `param_shardings`.
        optimizer: The optimizer.
        placement: Where everything lies.
        train_step: From `make_train_step`.
        evaluate: From `make_evaluation_loss`.
    """

    config: ModelConfig
    training: TrainingConfig
    trained: TrainedNames
    mesh: Mesh
    segments: tuple[Segment, ...]
    mask: Any
    shardings: Params
    optimizer: optax.GradientTransformation
    placement: Placement
    train_step: TrainStep
    evaluate: Evaluate


def make_program(
    experiment: Experiment, config: ModelConfig, trained: TrainedNames, devices: Sequence[Any]
) -> Program:
    """Checks the settings against network and devices, and lays out the training.

    Args:
        experiment: Its data, optimizer, mesh and training are used; the steps are resolved.
        config: The network.
        trained: Its parameters that are trained.
        devices: What to train on, of all processes; to compile ahead they need not exist.

    Returns:
        A program whose functions are called under `jax.set_mesh(program.mesh)`.

    Raises:
        UserError: A setting is out of range, or mesh, batch, attention, experts and network do not
            fit.
    """
    training = experiment.training
    check_training(training)
    check_attention(
        training.attention,
        platform=devices[0].platform,
        compute_dtype=training.compute_dtype,
        packed=experiment.data.format != "text" and experiment.data.packing,
        head_dim=config.head_dim,
        soft_cap=config.attention_soft_cap,
    )
    check_experts(training.experts, config.experts)
    mesh = make_mesh(experiment.mesh, devices)
    check_fits(config, training, mesh)
    segments = plan_segments(trained.blocks, config.layer_kinds)
    mask = trained_mask(config, segments, trained.outer)
    schedule = learning_rate_schedule(experiment.optimizer, training.steps)
    optimizer = make_optimizer(experiment.optimizer, schedule)
    placement = place(config, segments, mask, optimizer, mesh)
    return Program(
        config,
        training,
        trained,
        mesh,
        segments,
        mask,
        param_shardings(config, segments, mesh),
        optimizer,
        placement,
        make_train_step(config, training, optimizer, schedule, placement),
        make_evaluation_loss(config, training, placement),
    )


def program_costs(program: Program, sequence_length: int) -> Costs:
    """Counts what the program computes for sequences of a length."""
    return count_costs(
        program.config,
        program.trained.outer,
        program.trained.blocks,
        sequence_length=sequence_length,
        frozen_bytes=jnp.dtype(program.training.frozen_dtype).itemsize,
        remat=program.training.remat,
        experts=program.training.experts,
    )
