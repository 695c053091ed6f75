import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opt_deus_jax.models import loss
from opt_deus_jax.models.model_config import LogitsConfig

PLAIN = LogitsConfig()
ROWS, TOKENS, WIDTH, VOCABULARY = 2, 5, 6, 23


def inputs():
    generator = np.random.default_rng(0)
    hidden = jnp.asarray(generator.standard_normal((ROWS, TOKENS, WIDTH)), jnp.float32)
    head = jnp.asarray(generator.standard_normal((VOCABULARY, WIDTH)), jnp.float32)
    targets = jnp.asarray(generator.integers(0, VOCABULARY, (ROWS, TOKENS)), jnp.int32)
    weights = jnp.asarray([[1, 0, 1, 0.5, 1], [1, 0, 1, 2, 1]], jnp.float32)
    return hidden, head, targets, weights


def weighted_cross_entropy(*arguments, logits=PLAIN) -> jax.Array:
    return loss.weighted_cross_entropy(*arguments, logits)  # pyright: ignore[reportReturnType]


def plain(hidden, head, targets, weights, logits=PLAIN):
    products = hidden @ head.T / logits.divisor
    if logits.soft_cap is not None:
        products = logits.soft_cap * jnp.tanh(products / logits.soft_cap)
    log_probabilities = jax.nn.log_softmax(products)
    return -jnp.sum(
        weights * jnp.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0]
    )


@pytest.mark.parametrize(
    ("chunk", "logits"),
    [
        *((chunk, PLAIN) for chunk in (1, 4, 5, 10, 64)),
        *((4, LogitsConfig(7.0)), (4, LogitsConfig(1.0, 2.0)), (4, LogitsConfig(0.3, 2.0))),
    ],
)
def test_loss_and_both_gradients_equal_the_plain_formula(chunk, logits):
    hidden, head, targets, weights = inputs()

    def chunked(hidden, head):
        return 3 * weighted_cross_entropy(hidden, head, targets, weights, chunk, logits=logits)

    def expected(hidden, head):
        return 3 * plain(hidden, head, targets, weights, logits)

    value, gradients = jax.value_and_grad(chunked, (0, 1))(hidden, head)
    value_of_plain, gradients_of_plain = jax.value_and_grad(expected, (0, 1))(hidden, head)
    np.testing.assert_allclose(value, value_of_plain, rtol=1e-6)
    np.testing.assert_allclose(chunked(hidden, head), value_of_plain, rtol=1e-6)
    for ours, theirs in zip(gradients, gradients_of_plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not gradients[0][0, 1].any()


def test_a_frozen_head_costs_no_gradient_of_it():
    hidden, head, targets, weights = inputs()

    def of_hidden(hidden):
        return weighted_cross_entropy(hidden, head, targets, weights, 4)

    np.testing.assert_allclose(
        jax.grad(of_hidden)(hidden), jax.grad(plain)(hidden, head, targets, weights), atol=1e-5
    )
    # No array of the head's shape but the head itself is made.
    shape = f"f32[{VOCABULARY},{WIDTH}]"
    frozen = str(jax.make_jaxpr(jax.grad(of_hidden))(hidden))
    both = jax.grad(
        lambda hidden, head: weighted_cross_entropy(hidden, head, targets, weights, 4), (0, 1)
    )
    assert str(jax.make_jaxpr(both)(hidden, head)).count(shape) > frozen.count(shape)


def test_bfloat16_keeps_the_loss_in_float32():
    hidden, head, targets, weights = inputs()
    rough = weighted_cross_entropy(
        hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16), targets, weights, 4
    )
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, plain(hidden, head, targets, weights), rtol=0.02)
