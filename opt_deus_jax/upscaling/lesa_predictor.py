"""LESA's predictor: a small network that guesses a layer's coordinates from its neighbours'."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

HIDDEN = 256
EPOCHS = 10
BATCH = 64
NORM_WEIGHT = 5e-4
# torch.optim.AdamW as the authors call it, with what torch decays by itself.
OPTIMIZER = optax.adamw(1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
_CHUNK_BYTES = 64 * 2**20

Params = dict[str, Array]
# Positions of three layers: below, the one to be predicted, above.
Window = tuple[int, int, int]


class Batches(NamedTuple):
    """Rows of coordinates, a batch after another.

    Attributes:
        neighbours_SBE: The row of the layer below and that of the layer above, side by side.
        target_SBD: The row between them.
        weight_SB: 1, or 0 where the last batch of an epoch is not full.
    """

    neighbours_SBE: Float[np.ndarray, "s b e"]
    target_SBD: Float[np.ndarray, "s b d"]
    weight_SB: Float[np.ndarray, "s b"]


class Fit(NamedTuple):
    """How near the rows between their neighbours are hit.

    Attributes:
        loss: Mean loss of the batches.
        error: Norm of all that is missed over the norm of the rows.
    """

    loss: float
    error: float


def initial_params(key: Array, width: int) -> Params:
    """Draws the network as torch.nn.Linear draws its layers.

    Args:
        key: A JAX random key.
        width: Length d of a row.

    Returns:
        Kernels [out, in] and biases of 2d -> 256 -> 256 -> d, uniform within 1/sqrt(in).
    """
    sizes = (("first", 2 * width, HIDDEN), ("second", HIDDEN, HIDDEN), ("third", HIDDEN, width))
    params: Params = {}
    for part, (name, inputs, outputs) in zip(jax.random.split(key, 3), sizes, strict=True):
        bound = 1 / math.sqrt(inputs)
        for kind, shape in (("kernel", (outputs, inputs)), ("bias", (outputs,))):
            draw = jax.random.fold_in(part, len(shape))
            params[f"{name}_{kind}"] = jax.random.uniform(draw, shape, jnp.float32, -bound, bound)
    return params


def _linear(params: Params, name: str, x_BE: Array) -> Array:
    product = jnp.matmul(x_BE, params[f"{name}_kernel"].T, precision=jax.lax.Precision.HIGHEST)
    return product + params[f"{name}_bias"][None]


def predict_rows(params: Params, neighbours_BE: Float[Array, "b e"]) -> Float[Array, "b d"]:
    """Applies the network: three linear layers with ReLU between."""
    hidden = jax.nn.relu(_linear(params, "first", neighbours_BE))
    hidden = jax.nn.relu(_linear(params, "second", hidden))
    return _linear(params, "third", hidden)


def _norm(x: Array) -> Array:
    square = jnp.sum(x**2)
    # The gradient of a norm at zero is taken as zero, as torch does.
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def prediction_loss(
    predicted_BD: Float[Array, "b d"],
    target_BD: Float[Array, "b d"],
    weight_B: Float[Array, " b"],
) -> Float[Array, ""]:
    """(1 - l) MSE + l (|predicted| - |target|)^2 with l = 5e-4.

    The norms are those of the whole batch as one vector, as in the authors' notebook
    (train_LESA.ipynb: `torch.norm` of the batch).

    Args:
        predicted_BD: What the network gives.
        target_BD: What it should give.
        weight_B: 1 for rows that count, 0 for padding.

    Returns:
        The loss.
    """
    predicted_BD, target_BD = (x * weight_B[:, None] for x in (predicted_BD, target_BD))
    squares = jnp.sum((predicted_BD - target_BD) ** 2)
    mean_square = squares / (weight_B.sum() * target_BD.shape[1])
    gap = (_norm(predicted_BD) - _norm(target_BD)) ** 2
    return (1 - NORM_WEIGHT) * mean_square + NORM_WEIGHT * gap


def gather_batches(
    coordinates_LKI: np.ndarray, windows: Sequence[Window], order: np.ndarray
) -> Batches:
    """Takes the samples of one part of an epoch, padded to whole batches.

    Args:
        coordinates_LKI: Of all layers, in a file perhaps.
        windows: Which layers are predicted from which.
        order: Samples in the order in which they are seen; sample s is row s % k of window s // k,
            as in the authors' data set.

    Returns:
        The batches.
    """
    padded = np.concatenate([order, np.zeros(-len(order) % BATCH, order.dtype)])
    window, row = np.divmod(padded, coordinates_LKI.shape[1])
    below, target, above = (coordinates_LKI[np.asarray(windows)[window, i], row] for i in range(3))
    weight = (np.arange(len(padded)) < len(order)).astype(np.float32)
    neighbours = np.concatenate([below, above], axis=1)
    return Batches(*(x.reshape(-1, BATCH, *x.shape[1:]) for x in (neighbours, target, weight)))


@jax.jit
def train_on(
    params: Params, state: optax.OptState, batches: Batches
) -> tuple[Params, optax.OptState]:
    """Makes a step of AdamW on each batch."""

    def step(carry, batch):
        params, state = carry
        neighbours_BE, target_BD, weight_B = batch

        def loss(params):
            return prediction_loss(predict_rows(params, neighbours_BE), target_BD, weight_B)

        updates, state = OPTIMIZER.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), tuple(batches))[0]  # pyright: ignore


@jax.jit
def _measure(params: Params, batches: Batches) -> Array:
    """Per batch: losses of network and of the neighbours' mean, squared misses, squared norm."""

    def measure(batch):
        neighbours_BE, target_BD, weight_B = batch
        width = target_BD.shape[1]
        mean_BD = (neighbours_BE[:, :width] + neighbours_BE[:, width:]) / 2
        guesses = (predict_rows(params, neighbours_BE), mean_BD)
        weight_B1 = weight_B[:, None]
        return jnp.stack(
            [prediction_loss(guess, target_BD, weight_B) for guess in guesses]
            + [jnp.sum(weight_B1 * (guess - target_BD) ** 2) for guess in guesses]
            + [jnp.sum(weight_B1 * target_BD**2)]
        )

    return jax.lax.map(measure, tuple(batches))


def _parts(order: np.ndarray, width: int) -> list[np.ndarray]:
    """Cuts an epoch into parts whose rows fit in memory, of whole batches but the last."""
    samples = BATCH * max(1, _CHUNK_BYTES // (BATCH * 3 * width * 4))
    return [order[start : start + samples] for start in range(0, len(order), samples)]


def train_predictor(
    coordinates_LKI: np.ndarray,
    windows: Sequence[Window],
    key: Array,
    on_epoch: Callable[[], object] = lambda: None,
) -> tuple[Params, Fit, Fit]:
    """Trains the network on every row of every window: 10 epochs of AdamW, batches of 64.

    Source: Yang et al. 2025 (arXiv 2502.13794) and their notebook train_LESA.ipynb.

    Args:
        coordinates_LKI: Of all layers, in a file perhaps.
        windows: Which layers are predicted from which.
        key: Of the first weights and of the order of samples.
        on_epoch: Called after each epoch.

    Returns:
        The trained network, how it fits what it was trained on, and how the mean of the neighbours
        would.
    """
    width = coordinates_LKI.shape[2]
    num_samples = len(windows) * coordinates_LKI.shape[1]
    init_key, order_key = jax.random.split(key)
    params = initial_params(init_key, width)
    state = OPTIMIZER.init(params)
    for epoch_key in jax.random.split(order_key, EPOCHS):
        order = np.asarray(jax.random.permutation(epoch_key, num_samples))
        for part in _parts(order, width):
            batches = gather_batches(coordinates_LKI, windows, part)
            params, state = train_on(params, state, batches)
        on_epoch()
    measured = np.concatenate(
        [
            np.asarray(_measure(params, gather_batches(coordinates_LKI, windows, part)), np.float64)
            for part in _parts(np.arange(num_samples), width)
        ]
    )
    loss, mean_loss = measured[:, :2].mean(axis=0)
    missed, mean_missed, norm = np.sqrt(measured[:, 2:].sum(axis=0))
    fit = Fit(float(loss), float(missed / norm))
    return params, fit, Fit(float(mean_loss), float(mean_missed / norm))
