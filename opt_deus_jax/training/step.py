"""One optimizer step and the held-out loss, as functions of the trainable parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from opt_deus_jax.config import TrainingConfig
from opt_deus_jax.distributed.sharding import constrain
from opt_deus_jax.models.language_model import Params, head_kernel, hidden_states_and_load
from opt_deus_jax.models.loss import weighted_cross_entropy
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.moe import balance_loss
from opt_deus_jax.training.metrics import layer_norms
from opt_deus_jax.training.placement import Placement
from opt_deus_jax.training.segments import merge


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
        step: Optimizer steps made, int32 scalar.
        trainable: Param pytree, float32, None for frozen leaves.
        optimizer_state: State of the optimizer for the trainable leaves.
    """

    step: Array
    trainable: Params
    optimizer_state: optax.OptState


Batch = dict[str, Array]
Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]
Evaluate = Callable[[Params, Params, Batch, Array], tuple[Array, Array]]


def initial_state(
    trainable: Params, optimizer: optax.GradientTransformation, placement: Placement
) -> TrainState:
    """The state before the first step, made in its shards.

    Args:
        trainable: Param pytree with None for frozen leaves.
        optimizer: The optimizer.
        placement: Where everything lies.

    Returns:
        A state that shares the arrays of `trainable`.
    """
    start = jax.jit(
        lambda params: (jnp.zeros((), jnp.int32), optimizer.init(params)),
        out_shardings=(placement.scalar, placement.optimizer_state),
    )
    step, optimizer_state = start(trainable)
    return TrainState(step, trainable, optimizer_state)


def prediction_weights(batch: Batch) -> Float[Array, "b t"]:
    """Which predictions count.

    Args:
        batch: "tokens" [B, T + 1]; for instructions also "example" (number of the example that each
            token belongs to, 0 for padding) and "is_answer".

    Returns:
        float32 [B, T], 1 where token t + 1 is to be predicted from those before it in its example.
    """
    if "example" not in batch:
        return jnp.ones_like(batch["tokens"][:, 1:], jnp.float32)
    example_BL = batch["example"]
    goes_on_BT = (example_BL[:, 1:] == example_BL[:, :-1]) & (example_BL[:, 1:] > 0)
    return (goes_on_BT & batch["is_answer"][:, 1:]).astype(jnp.float32)


def loss_fn(
    trainable: Params,
    frozen: Params,
    batch: Batch,
    weights_BT: Float[Array, "b t"],
    *,
    config: ModelConfig,
    training: TrainingConfig,
    balance: float = 0.0,
) -> Float[Array, ""]:
    """Weighted sum of the cross-entropies of predicting each token from those before it.

    Args:
        trainable: What to differentiate with respect to.
        frozen: The rest of the params.
        batch: "tokens" [B, T + 1] and, for instructions, "example" [B, T + 1].
        weights_BT: Weight of each of the T predictions, float32.
        config: The network.
        training: Its types, attention, experts, remat and chunk of the loss are used.
        balance: What `balance_loss` of the experts weighs beside it, if they have any.

    Returns:
        A float32 scalar, in nats times the unit of the weights.
    """
    params = merge(trainable, frozen)
    dtype = jnp.dtype(training.compute_dtype)
    kernel_dtype = jnp.dtype(training.kernel_dtype or dtype)
    tokens_BL, example_BL = batch["tokens"], batch.get("example")
    hidden_BTD, load = hidden_states_and_load(
        params,
        tokens_BL[:, :-1],
        None if example_BL is None else example_BL[:, :-1],
        config=config,
        dtype=dtype,
        attention=training.attention,
        remat=training.remat,
        kernel_dtype=kernel_dtype,
        experts=training.experts,
        wants_load=balance > 0,
    )
    loss: Any = weighted_cross_entropy(
        hidden_BTD,
        head_kernel(params, kernel_dtype),
        tokens_BL[:, 1:],
        weights_BT,
        training.loss_chunk_tokens,
        config.logits,
    )
    if load is None or config.experts is None:
        return loss
    return loss + balance * balance_loss(load, config.experts)


def mean_loss_and_gradients(
    trainable: Params,
    frozen: Params,
    batch: Batch,
    *,
    config: ModelConfig,
    training: TrainingConfig,
    shardings: Any = None,
) -> tuple[Float[Array, ""], Params]:
    """Mean loss of a batch and its gradients, cut into `accumulation_steps` parts.

    Args:
        trainable: What to differentiate with respect to.
        frozen: The rest of the params.
        batch: See `prediction_weights`; `accumulation_steps` divides the number of rows.
        config: The network.
        training: The settings.
        shardings: Of the gradients, a tree like `trainable`; None leaves them to the compiler.

    Returns:
        (mean cross-entropy in nats of the predictions that count, gradients like `trainable`).
        Where config.json asks for it, the loss has the balance of the experts in it, each part's
        weighted alike, as in transformers.
    """
    weights_BT = prediction_weights(batch)
    # Each prediction weighs the same in the whole batch: the parts then only need to be added.
    weights_BT = weights_BT / jnp.maximum(jnp.sum(weights_BT), 1)

    parts = training.accumulation_steps
    balance = config.experts.balance / parts if config.experts else 0.0

    def part(arrays: tuple[Batch, Array]) -> tuple[Array, Params]:
        loss, gradients = jax.value_and_grad(loss_fn)(
            trainable, frozen, *arrays, config=config, training=training, balance=balance
        )
        if shardings is not None:
            gradients = jax.lax.with_sharding_constraint(gradients, shardings)
        return loss, gradients

    if parts == 1:
        return part((batch, weights_BT))

    def add(total: tuple[Array, Params], arrays: Any) -> tuple[tuple[Array, Params], None]:
        return jax.tree.map(jnp.add, total, part(arrays)), None

    def cut(x_BL: Array) -> Array:
        # Part a takes rows a, a + A, ...: where the rows are spread over devices in runs, every
        # device then has rows in every part.
        x_ABL = x_BL.reshape(-1, parts, x_BL.shape[1]).swapaxes(0, 1)
        return constrain(x_ABL, "accumulation", "batch", "length")

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable))
    return jax.lax.scan(add, zeros, jax.tree.map(cut, (batch, weights_BT)))[0]


def make_train_step(
    config: ModelConfig,
    training: TrainingConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    placement: Placement,
) -> TrainStep:
    """Compiles one optimizer step.

    Args:
        config: The network.
        training: The settings.
        optimizer: The optimizer.
        schedule: Its learning rate, for the metrics.
        placement: Where everything lies.

    Returns:
        `train_step(state, frozen, batch) -> (state, metrics)`, to be called under `jax.set_mesh`.
        It consumes the state. Metrics are the float32 scalars loss (nats a predicted token, and
        the balance of experts where it is trained), grad_norm (before clipping) and learning_rate,
        and by trained layer layer_grad_norm and layer_parameter_norm (before the update).
    """

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, gradients = mean_loss_and_gradients(
            state.trainable,
            frozen,
            batch,
            config=config,
            training=training,
            shardings=placement.trainable,
        )
        updates, optimizer_state = optimizer.update(
            gradients, state.optimizer_state, state.trainable
        )
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": schedule(state.step),
            "layer_grad_norm": layer_norms(gradients),
            "layer_parameter_norm": layer_norms(state.trainable),
        }
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, optimizer_state), metrics  # pyright: ignore

    state = state_placement(placement)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state, placement.frozen, placement.rows),
        out_shardings=(state, placement.scalar),
    )


def state_placement(placement: Placement) -> TrainState:
    """The shardings of a `TrainState`."""
    return TrainState(placement.scalar, placement.trainable, placement.optimizer_state)  # pyright: ignore


def make_evaluation_loss(
    config: ModelConfig, training: TrainingConfig, placement: Placement
) -> Evaluate:
    """Compiles the loss of a held-out batch.

    Args:
        config: The network.
        training: The settings.
        placement: Where everything lies.

    Returns:
        `evaluation_loss(trainable, frozen, batch, is_real [B])` -> (sum of nats, number of tokens
        predicted), float32 scalars over the real rows, to be called under `jax.set_mesh`.
    """

    def evaluation_loss(
        trainable: Params, frozen: Params, batch: Batch, is_real_B: Bool[Array, " b"]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        weights_BT = prediction_weights(batch) * is_real_B.astype(jnp.float32)[:, None]
        nats = loss_fn(trainable, frozen, batch, weights_BT, config=config, training=training)
        return nats, jnp.sum(weights_BT)

    rows = placement.rows
    return jax.jit(
        evaluation_loss,
        in_shardings=(placement.trainable, placement.frozen, rows, rows),
        out_shardings=placement.scalar,
    )
