"""Cross-entropy over a large vocabulary without all logits in memory at once."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from opt_deus_jax.models.attention import matmul_precision
from opt_deus_jax.models.language_model import project_to_vocabulary


def _chunks(x: Array, chunk: int) -> Array:
    padding = -x.shape[0] % chunk
    padded = jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1))
    return padded.reshape(-1, chunk, *x.shape[1:])


def _chunk_loss(hidden: Array, head: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
    logits_CV = project_to_vocabulary(hidden, head)
    log_normalizer_C = jax.nn.logsumexp(logits_CV, axis=-1)
    target_C = jnp.take_along_axis(logits_CV, targets[:, None], axis=-1)[:, 0]
    return jnp.sum((log_normalizer_C - target_C) * weights), logits_CV - log_normalizer_C[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_cross_entropy(
    hidden_MD: Float[Array, "m d"],
    head_VD: Float[Array, "v d"],
    targets_M: Int[Array, " m"],
    weights_M: Float[Array, " m"],
    chunk_tokens: int,
) -> Float[Array, ""]:
    """Sum over tokens of weight times cross-entropy in nats, float32.

    The gradient is computed along with the loss, a chunk of tokens at a time, so the logits of a
    chunk are made once and at most `chunk_tokens * v` of them exist. The gradient of the head is
    computed only where it is asked for.

    Args:
        hidden_MD: What the head is applied to.
        head_VD: The output kernel.
        targets_M: The tokens to predict.
        weights_M: float32; 0 leaves a token out. Not differentiated.
        chunk_tokens: Tokens a chunk.

    Returns:
        A scalar.
    """

    def step(total: Array, chunk: tuple) -> tuple[Array, None]:
        hidden, targets, weights = chunk
        return total + _chunk_loss(hidden, head_VD, targets, weights)[0], None

    arrays = tuple(_chunks(x, chunk_tokens) for x in (hidden_MD, targets_M, weights_M))
    return jax.lax.scan(step, jnp.zeros(()), arrays)[0]


def _forward(hidden_MD, head_VD, targets_M, weights_M, chunk_tokens):  # noqa: ANN001
    hidden, head = hidden_MD.value, head_VD.value
    head_is_trained = head_VD.perturbed
    precision = matmul_precision(hidden.dtype)

    def step(state: tuple, chunk: tuple) -> tuple[tuple, Array]:
        total, head_gradient = state
        hidden_CD, targets, weights = chunk
        loss, log_probabilities_CV = _chunk_loss(hidden_CD, head, targets, weights)
        is_target_CV = targets[:, None] == jnp.arange(head.shape[0])[None]
        gradient_CV = (jnp.exp(log_probabilities_CV) - is_target_CV) * weights[:, None]
        gradient_CV = gradient_CV.astype(hidden_CD.dtype)
        hidden_gradient = jnp.matmul(gradient_CV, head.astype(hidden_CD.dtype), precision=precision)
        if head_is_trained:
            head_gradient = head_gradient + jnp.einsum(
                "cv,cd->vd",
                gradient_CV,
                hidden_CD,
                precision=precision,
                preferred_element_type=jnp.float32,
            )
        return (total + loss, head_gradient), hidden_gradient

    arrays = tuple(_chunks(x, chunk_tokens) for x in (hidden, targets_M.value, weights_M.value))
    start = jnp.zeros(head.shape if head_is_trained else (), jnp.float32)
    (total, head_gradient), hidden_gradients = jax.lax.scan(step, (jnp.zeros(()), start), arrays)
    hidden_gradient = hidden_gradients.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    # A scalar stands for "no gradient of the head"; the empty array carries the head's dtype.
    head_like = jnp.zeros((0,), head.dtype)
    return total, (hidden_gradient, head_gradient, head_like, weights_M.value)


def _backward(chunk_tokens, residuals, cotangent):  # noqa: ANN001
    hidden_gradient, head_gradient, head_like, _ = residuals
    head = None if head_gradient.ndim == 0 else (head_gradient * cotangent).astype(head_like.dtype)
    return (hidden_gradient * cotangent.astype(hidden_gradient.dtype), head, None, None)


weighted_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)
