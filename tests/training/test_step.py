import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from opt_deus_jax.config import OptimizerConfig, TrainingConfig
from opt_deus_jax.models.language_model import logits
from opt_deus_jax.models.model_config import ModelConfig, read_model_config
from opt_deus_jax.models.params import identity_values
from opt_deus_jax.training.optimizer import learning_rate_schedule, make_optimizer
from opt_deus_jax.training.placement import Placement, param_shardings, place
from opt_deus_jax.training.segments import (
    invert_mask,
    merge,
    plan_segments,
    select_trained,
    trained_mask,
)
from opt_deus_jax.training.step import (
    initial_state,
    loss_fn,
    make_evaluation_loss,
    make_train_step,
    mean_loss_and_gradients,
)
from opt_deus_jax.training.weights import load_params, parameter_hash
from tests.training.tiny import one_device_mesh, tiny_source

F, T = False, True
FLOAT32 = jnp.dtype("float32")
TOP = [F, F, F, T, F, T, F]


SETTINGS = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, decay_fraction=0.0)
SCHEDULE = learning_rate_schedule(SETTINGS, 20)
OPTIMIZER = make_optimizer(SETTINGS, SCHEDULE)


def load(
    mask_by_depth: list[bool], trained: str, **changes: Any
) -> tuple[ModelConfig, dict[str, Any], dict[str, Any]]:
    """(config, trainable, frozen) of a tiny network whose trained layers are the identity."""
    return load_placed(mask_by_depth, trained, **changes)[:3]


def load_placed(
    mask_by_depth: list[bool], trained: str, **changes: Any
) -> tuple[ModelConfig, dict[str, Any], dict[str, Any], Placement]:
    zeroed = tuple(d for d, is_new in enumerate(mask_by_depth) if is_new and trained == "new")
    source = tiny_source(zeroed, num_hidden_layers=len(mask_by_depth), **changes)
    config = read_model_config(source.hf_config)
    names = select_trained(config, mask_by_depth, trained)
    segments = plan_segments(names.blocks)
    mask = trained_mask(config, segments, names.outer)
    mesh = one_device_mesh()
    shardings = param_shardings(config, segments, mesh)
    trainable, frozen = (
        load_params(source, config, segments, dtype=FLOAT32, shardings=shardings, wanted=wanted)
        for wanted in (mask, invert_mask(mask))
    )
    return config, trainable, frozen, place(config, segments, mask, OPTIMIZER, mesh)


def draw_tokens(batch: int = 4, length: int = 9, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 64)


def gradients_of(
    trainable: Any, frozen: Any, tokens: jax.Array, config: ModelConfig, training: TrainingConfig
) -> tuple[jax.Array, Any]:
    compiled = jax.jit(functools.partial(mean_loss_and_gradients, config=config, training=training))
    return compiled(trainable, frozen, {"tokens": tokens})


def scans(jaxpr: Any) -> list[Any]:
    """Every scan of a jaxpr, in order, those within calls included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            found.append(equation)
        else:
            for inner in jaxprs_in_params(equation.params):
                found += scans(inner)
    return found


def gradient_jaxpr(remat: str) -> tuple[ModelConfig, Any]:
    config, trainable, frozen = load(TOP, "new")
    weights = jnp.ones((4, 8))
    training = TrainingConfig(remat=remat)

    def loss(trainable: Any, frozen: Any) -> jax.Array:
        batch = {"tokens": draw_tokens()}
        return loss_fn(trainable, frozen, batch, weights, config=config, training=training)

    return config, jax.make_jaxpr(jax.grad(loss))(trainable, frozen).jaxpr


@pytest.mark.parametrize("remat", ["none", "block"])
def test_the_frozen_prefix_is_forward_only(remat: str):
    config, jaxpr = gradient_jaxpr(remat)
    found = scans(jaxpr)
    prefix = [scan for scan in found if scan.params["length"] == 3]
    assert [scan.params["reverse"] for scan in prefix] == [False]
    # It hands on the residual stream and stacks nothing.
    outputs = [variable.aval.shape for variable in prefix[0].outvars]
    assert outputs == [(4, 8, config.width)]
    trained = [scan for scan in found if scan.params["length"] == 2]
    assert sorted(scan.params["reverse"] for scan in trained) == [False, True]


def test_first_gradient_reaches_only_the_kernels_that_are_zero():
    config, trainable, frozen = load(TOP, "new")
    _, gradients = gradients_of(trainable, frozen, draw_tokens(), config, TrainingConfig())
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    assert len(leaves) == 9
    for path, gradient in leaves:
        if path[-1].key in identity_values(config):
            assert np.all(np.any(np.asarray(gradient), axis=(1, 2)))
        else:
            assert not np.any(gradient)


@pytest.mark.parametrize("trained", ["new", "all"])
def test_accumulated_gradient_is_that_of_the_whole_batch(trained: str):
    config, trainable, frozen = load([T] * 2 if trained == "all" else [F, T], trained)
    tokens = draw_tokens(batch=6)
    whole, parts = (
        gradients_of(trainable, frozen, tokens, config, TrainingConfig(accumulation_steps=count))
        for count in (1, 3)
    )
    assert jax.tree.structure(whole) == jax.tree.structure(parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, parts)


@pytest.mark.parametrize(
    ("mask", "trained", "tied"),
    [([F, T], "new", True), ([T, T], "all", True), ([T, T], "all", False)],
)
def test_loss_and_gradients_are_those_of_plain_cross_entropy(
    mask: list[bool], trained: str, tied: bool
):
    config, trainable, frozen = load(mask, trained, tie_word_embeddings=tied)
    tokens = draw_tokens(batch=3)

    def plain(trainable: Any) -> jax.Array:
        all_logits = logits(merge(trainable, frozen), tokens[:, :-1], config=config, dtype=FLOAT32)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(all_logits, tokens[:, 1:]))

    # 24 tokens in chunks of 7: the last one is filled up.
    training = TrainingConfig(loss_chunk_tokens=7)
    actual = gradients_of(trainable, frozen, tokens, config, training)
    expected = jax.jit(jax.value_and_grad(plain))(trainable)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), actual, expected)


def test_training_moves_what_is_trained_and_nothing_else():
    config, trainable, frozen, placement = load_placed([F, F, T, F], "new")
    train_step = make_train_step(config, TrainingConfig(), OPTIMIZER, SCHEDULE, placement)
    evaluate = make_evaluation_loss(config, TrainingConfig(), placement)
    state = initial_state(trainable, OPTIMIZER, placement)
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(trainable))

    batch = {"tokens": draw_tokens()}
    is_real = jnp.array([True, True, False, True])
    before = parameter_hash(frozen), parameter_hash(trainable)
    nats, count = evaluate(trainable, frozen, batch, is_real)
    assert count == 24
    losses = []
    for _ in range(20):
        state, metrics = train_step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert parameter_hash(frozen) == before[0]
    assert parameter_hash(state.trainable) != before[1]
    assert int(state.step) == 20
    assert losses[-1] < losses[0] - 0.05
    after, _ = evaluate(state.trainable, frozen, batch, is_real)
    assert after < nats


def test_rows_that_are_not_real_count_for_nothing():
    config, trainable, frozen, placement = load_placed([F, T], "new")
    evaluate = make_evaluation_loss(config, TrainingConfig(), placement)
    tokens = draw_tokens()
    is_real = jnp.array([True, True, False, False])
    actual = evaluate(trainable, frozen, {"tokens": tokens}, is_real)
    others = evaluate(trainable, frozen, {"tokens": tokens.at[2:].set(0)}, is_real)
    whole = evaluate(trainable, frozen, {"tokens": tokens[:2]}, jnp.array([True, True]))
    np.testing.assert_array_equal(actual, others)
    np.testing.assert_allclose(actual, whole, rtol=1e-6)
    assert actual[1] == 16
