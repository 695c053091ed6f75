"""Cross-entropy over a large vocabulary without all logits in memory at once."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from opt_deus_jax.distributed.sharding import constrain, num_shards
from opt_deus_jax.models.attention import matmul_precision
from opt_deus_jax.models.language_model import project_to_vocabulary
from opt_deus_jax.models.model_config import LogitsConfig


def _chunks(x_BT: Array, chunk_tokens: int) -> Array:
    """Cuts along the length, so that every chunk has tokens of every device."""
    batch, length = x_BT.shape[:2]
    rows = -(-batch // num_shards("batch"))
    chunk = min(max(chunk_tokens // rows, 1), length)
    padding = ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x_BT.ndim - 2)
    chunks_BNC = jnp.pad(x_BT, padding).reshape(batch, -1, chunk, *x_BT.shape[2:])
    return jnp.moveaxis(chunks_BNC, 1, 0)


def _chunk_loss(
    hidden_BCD: Array, head_VD: Array, targets_BC: Array, weights_BC: Array, logits: LogitsConfig
) -> tuple[Array, Array, Array | None]:
    """Loss, probabilities, and the slope of the soft cap, where there is one."""
    logits_BCV = project_to_vocabulary(hidden_BCD, head_VD, logits)
    logits_BCV = constrain(logits_BCV, "batch", "length", "vocabulary")
    # Exponentials are stored, not made again for the gradient: they cost more than memory does.
    highest_BC = jnp.max(logits_BCV, axis=-1)
    exponentials_BCV = jnp.exp(logits_BCV - highest_BC[..., None])
    sum_BC = jnp.sum(exponentials_BCV, axis=-1)
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    loss = jnp.sum((jnp.log(sum_BC) + highest_BC - target_BC) * weights_BC)
    slope_BCV = None
    if logits.soft_cap is not None:
        slope_BCV = 1 - (logits_BCV / logits.soft_cap) ** 2
    return loss, exponentials_BCV / sum_BC[..., None], slope_BCV


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def weighted_cross_entropy(
    hidden_BTD: Float[Array, "b t d"],
    head_VD: Float[Array, "v d"],
    targets_BT: Int[Array, "b t"],
    weights_BT: Float[Array, "b t"],
    chunk_tokens: int,
    logits: LogitsConfig,
) -> Float[Array, ""]:
    """Sum over tokens of weight times cross-entropy in nats, float32.

    The gradient is computed along with the loss, a chunk of tokens at a time, so the logits of a
    chunk are made once and at most `chunk_tokens * v` of them exist on a device. The gradient of
    the head is computed only where it is asked for.

    Args:
        hidden_BTD: What the head is applied to.
        head_VD: The output kernel, in the dtype of `hidden_BTD`.
        targets_BT: The tokens to predict.
        weights_BT: float32; 0 leaves a token out. Not differentiated.
        chunk_tokens: Tokens a chunk on each device; at least one of each row.
        logits: What is done to the products with the head.

    Returns:
        A scalar.
    """

    def step(total: Array, chunk: tuple) -> tuple[Array, None]:
        hidden, targets, weights = chunk
        return total + _chunk_loss(hidden, head_VD, targets, weights, logits)[0], None

    arrays = tuple(_chunks(x, chunk_tokens) for x in (hidden_BTD, targets_BT, weights_BT))
    return jax.lax.scan(step, jnp.zeros(()), arrays)[0]


def _forward(hidden_BTD, head_VD, targets_BT, weights_BT, chunk_tokens, logits):  # noqa: ANN001
    hidden, head = hidden_BTD.value, head_VD.value
    head_is_trained = head_VD.perturbed
    precision = matmul_precision(hidden.dtype)

    def step(state: tuple, chunk: tuple) -> tuple[tuple, Array]:
        total, head_gradient = state
        hidden_BCD, targets, weights = chunk
        loss, probabilities_BCV, slope_BCV = _chunk_loss(hidden_BCD, head, targets, weights, logits)
        is_target_BCV = targets[..., None] == jnp.arange(head.shape[0])[None, None]
        gradient_BCV = (probabilities_BCV - is_target_BCV) * weights[..., None]
        if logits.divisor != 1:
            gradient_BCV = gradient_BCV / logits.divisor
        if slope_BCV is not None:
            gradient_BCV = gradient_BCV * slope_BCV
        gradient_BCV = gradient_BCV.astype(hidden_BCD.dtype)
        # Flat, as in `DecoderBlock`.
        gradient_MV = gradient_BCV.reshape(-1, head.shape[0])
        hidden_gradient = jnp.einsum("mv,vd->md", gradient_MV, head, precision=precision)
        if head_is_trained:
            added = jnp.einsum(
                "mv,md->vd",
                gradient_MV,
                hidden_BCD.reshape(-1, head.shape[1]),
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            # Cut by width already here: no device ever holds the whole sum.
            head_gradient = head_gradient + constrain(added, "vocabulary", "width")
        return (total + loss, head_gradient), hidden_gradient.reshape(hidden_BCD.shape)

    arrays = tuple(_chunks(x, chunk_tokens) for x in (hidden, targets_BT.value, weights_BT.value))
    start = jnp.zeros((), jnp.float32)
    if head_is_trained:
        start = constrain(jnp.zeros(head.shape, jnp.float32), "vocabulary", "width")
    (total, head_gradient), gradients_NBCD = jax.lax.scan(step, (jnp.zeros(()), start), arrays)
    batch, length, width = hidden.shape
    hidden_gradient = jnp.moveaxis(gradients_NBCD, 0, 1).reshape(batch, -1, width)[:, :length]
    # A scalar stands for "no gradient of the head".
    return total, (hidden_gradient, head_gradient)


def _backward(chunk_tokens, logits, residuals, cotangent):  # noqa: ANN001
    hidden_gradient, head_gradient = residuals
    dtype = hidden_gradient.dtype
    head = None if head_gradient.ndim == 0 else (head_gradient * cotangent).astype(dtype)
    return (hidden_gradient * cotangent.astype(dtype), head, None, None)


weighted_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)
