"""One optimizer step and the held-out loss, as functions of the trainable parameters."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from opt_deus_jax.config import TrainingConfig
from opt_deus_jax.models.language_model import Params, head_kernel, hidden_states
from opt_deus_jax.models.loss import weighted_cross_entropy
from opt_deus_jax.models.model_config import ModelConfig
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


Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, Params, Array], tuple[TrainState, Metrics]]
Evaluate = Callable[[Params, Params, Array, Array], tuple[Array, Array]]


def initial_state(trainable: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step.

    Args:
        trainable: Param pytree with None for frozen leaves.
        optimizer: The optimizer.

    Returns:
        A state that shares the arrays of `trainable`.
    """
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))


def loss_fn(
    trainable: Params,
    frozen: Params,
    tokens_BL: Int[Array, "b l"],
    weights_BT: Float[Array, "b t"],
    *,
    config: ModelConfig,
    training: TrainingConfig,
) -> Float[Array, ""]:
    """Weighted sum of the cross-entropies of predicting each token from those before it.

    Args:
        trainable: What to differentiate with respect to.
        frozen: The rest of the params.
        tokens_BL: Sequences of T + 1 tokens.
        weights_BT: Weight of each of the T predictions, float32.
        config: The network.
        training: Its compute dtype, remat and chunk of the loss are used.

    Returns:
        A float32 scalar, in nats times the unit of the weights.
    """
    params = merge(trainable, frozen)
    hidden_BTD = hidden_states(
        params,
        tokens_BL[:, :-1],
        config=config,
        dtype=jnp.dtype(training.compute_dtype),
        remat=training.remat,
    )
    return weighted_cross_entropy(
        hidden_BTD.reshape(-1, config.width),
        head_kernel(params),
        tokens_BL[:, 1:].reshape(-1),
        weights_BT.reshape(-1),
        training.loss_chunk_tokens,
    )


def mean_loss_and_gradients(
    trainable: Params,
    frozen: Params,
    tokens_BL: Int[Array, "b l"],
    *,
    config: ModelConfig,
    training: TrainingConfig,
) -> tuple[Float[Array, ""], Params]:
    """Mean loss of a batch and its gradients, cut into `accumulation_steps` parts.

    Args:
        trainable: What to differentiate with respect to.
        frozen: The rest of the params.
        tokens_BL: Sequences of T + 1 tokens; `accumulation_steps` divides their number.
        config: The network.
        training: The settings.

    Returns:
        (mean cross-entropy in nats, gradients like `trainable`).
    """
    batch, length = tokens_BL.shape
    parts = training.accumulation_steps
    # Each prediction weighs the same in the whole batch: the parts then only need to be added.
    weights_BT = jnp.full((batch // parts, length - 1), 1 / (batch * (length - 1)), jnp.float32)

    def part(tokens: Array) -> tuple[Array, Params]:
        return jax.value_and_grad(loss_fn)(
            trainable, frozen, tokens, weights_BT, config=config, training=training
        )

    if parts == 1:
        return part(tokens_BL)

    def add(total: tuple[Array, Params], tokens: Array) -> tuple[tuple[Array, Params], None]:
        return jax.tree.map(jnp.add, total, part(tokens)), None

    # Part a takes rows a, a + A, ...: where the rows are spread over devices in runs, every device
    # then has rows in every part.
    tokens_ABL = tokens_BL.reshape(batch // parts, parts, length).swapaxes(0, 1)
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable))
    return jax.lax.scan(add, zeros, tokens_ABL)[0]


def make_train_step(
    config: ModelConfig,
    training: TrainingConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> TrainStep:
    """Compiles one optimizer step.

    Args:
        config: The network.
        training: The settings.
        optimizer: The optimizer.
        schedule: Its learning rate, for the metrics.

    Returns:
        `train_step(state, frozen, tokens [B, T + 1]) -> (state, metrics)`. It consumes the state.
        Metrics are the float32 scalars loss (nats a token), grad_norm (before clipping) and
        learning_rate.
    """

    def train_step(
        state: TrainState, frozen: Params, tokens_BL: Int[Array, "b l"]
    ) -> tuple[TrainState, Metrics]:
        loss, gradients = mean_loss_and_gradients(
            state.trainable, frozen, tokens_BL, config=config, training=training
        )
        updates, optimizer_state = optimizer.update(
            gradients, state.optimizer_state, state.trainable
        )
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": schedule(state.step),
        }
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, optimizer_state), metrics  # pyright: ignore

    return jax.jit(train_step, donate_argnums=0)


def make_evaluation_loss(config: ModelConfig, training: TrainingConfig) -> Evaluate:
    """Compiles the loss of a held-out batch.

    Args:
        config: The network.
        training: The settings.

    Returns:
        `evaluation_loss(trainable, frozen, tokens [B, T + 1], is_real [B])` -> (sum of nats,
        number of tokens predicted), float32 scalars over the real rows.
    """

    def evaluation_loss(
        trainable: Params,
        frozen: Params,
        tokens_BL: Int[Array, "b l"],
        is_real_B: Bool[Array, " b"],
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        shape = (tokens_BL.shape[0], tokens_BL.shape[1] - 1)
        weights_BT = jnp.broadcast_to(is_real_B.astype(jnp.float32)[:, None], shape)
        nats = loss_fn(trainable, frozen, tokens_BL, weights_BT, config=config, training=training)
        return nats, jnp.sum(weights_BT)

    return jax.jit(evaluation_loss)
