"""Packed and padded instructions against each example alone."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opt_deus_jax.config import DataConfig, Experiment, OptimizerConfig, TrainingConfig
from opt_deus_jax.data.packing import Example, FirstFit, fill_row, place_dtype
from opt_deus_jax.data.records import Records
from opt_deus_jax.models.language_model import logits
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.training.loop import train
from opt_deus_jax.training.segments import merge, select_trained
from opt_deus_jax.training.step import mean_loss_and_gradients
from tests.training.test_step import load
from tests.training.tiny import tiny_hf_config, tiny_source

LENGTH = 12
# Few lengths, as each compiles another program of the single example; 13 fills a row.
LENGTHS = (3, 5, 13)


def draw_examples(count: int, seed: int) -> list[Example]:
    draw = np.random.default_rng(seed)
    examples = []
    for length in draw.choice(LENGTHS, count):
        # Token 0, which is that of the padding, is a token like others; answers come in runs, and
        # some begin with the example: their first token has nothing to be predicted from.
        is_answer = draw.random(length) < 0.6
        is_answer[-1] = True
        examples.append(Example(draw.integers(0, 64, length), is_answer))
    return examples


def rows_of(examples: list[Example], packing: bool) -> Records:
    packer, places = FirstFit(LENGTH + 1), LENGTH + 1
    if packing:
        rows = [row for example in examples for row in packer.add(example)] + packer.finish()
    else:
        rows = [[example] for example in examples]
    # An even number, for accumulation: an empty row counts for nothing.
    rows += [[]] * (len(rows) % 2)
    dtype = place_dtype("uint16", places)
    flat = np.concatenate([fill_row(row, places, dtype) for row in rows])
    return Records(flat["token"], LENGTH, flat["label"])


def batch_of(records: Records) -> dict[str, jax.Array]:
    return {name: jnp.asarray(a) for name, a in records.rows(range(len(records))).items()}


def summed_alone(
    trainable: Any, frozen: Any, tokens_T: jax.Array, is_answer_T: jax.Array, *, config: Any
) -> jax.Array:
    """Nats of the answer tokens of one example, without padding, packing or chunks."""
    found = logits(
        merge(trainable, frozen), tokens_T[None, :-1], config=config, dtype=jnp.dtype("float32")
    )
    nats_T = optax.softmax_cross_entropy_with_integer_labels(found[0], tokens_T[1:])
    return jnp.sum(nats_T * is_answer_T[1:])


@pytest.mark.parametrize(
    ("packing", "parts", "trained"), [(True, 1, "all"), (True, 2, "new"), (False, 1, "new")]
)
def test_loss_and_gradients_are_those_of_each_example_alone(
    packing: bool, parts: int, trained: str
):
    config, trainable, frozen = load([False, True], trained)
    examples = draw_examples(9, seed=parts)
    batch = batch_of(rows_of(examples, packing))
    assert (int(batch["example"].max()) > 1) == packing
    training = TrainingConfig(accumulation_steps=parts, loss_chunk_tokens=16)
    compiled = jax.jit(functools.partial(mean_loss_and_gradients, config=config, training=training))
    loss, gradients = compiled(trainable, frozen, batch)

    alone = jax.jit(jax.value_and_grad(functools.partial(summed_alone, config=config)))
    results = [
        alone(trainable, frozen, jnp.asarray(e.tokens), jnp.asarray(e.is_answer, jnp.float32))
        for e in examples
    ]
    count = sum(int(example.is_answer[1:].sum()) for example in examples)
    expected_loss = sum(float(nats) for nats, _ in results) / count
    expected = jax.tree.map(lambda *parts: sum(parts) / count, *(tree for _, tree in results))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for found, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.max(jnp.abs(wanted)))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * scale)


def test_what_lies_outside_the_answers_is_read_but_not_learnt():
    config, trainable, frozen = load([False, True], "all")
    compiled = jax.jit(
        functools.partial(mean_loss_and_gradients, config=config, training=TrainingConfig())
    )
    tokens = np.array([[7, 8, 9, 10, 11, 12, 0, 0, 0]])
    example = np.array([[1, 1, 1, 2, 2, 2, 0, 0, 0]])
    is_answer = np.array([[0, 0, 1, 0, 1, 1, 0, 0, 0]], bool)

    def loss_with(place: int) -> float:
        changed = tokens.copy()
        changed[0, place] = 33
        batch = {"tokens": changed, "example": example, "is_answer": is_answer}
        return float(compiled(trainable, frozen, batch)[0])

    losses = [loss_with(place) for place in range(9)]
    # Padding changes nothing; every token of an example does, its prompt included.
    assert len(set(losses[6:])) == 1
    assert all(loss != losses[6] for loss in losses[:6])


def test_a_run_learns_the_answers_of_packed_records(tmp_path: Path):
    # Token 10 asks for the token before it again; 9 ends the answer.
    draw = np.random.default_rng(0)
    examples = []
    for length in draw.integers(2, 6, 240):
        prompt = draw.integers(1, 8, length)
        tokens = np.concatenate([prompt, [10], prompt[-1:], [9]])
        examples.append(Example(tokens, np.arange(length + 3) > length))
    config = read_model_config(tiny_hf_config())
    result = train(
        Experiment(
            data=DataConfig(format="alpaca"),
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
            training=TrainingConfig(steps=0, epochs=4, batch_size=8),
        ),
        tiny_source(),
        trained=select_trained(config, [False] * config.num_layers, "all"),
        train_records=rows_of(examples[:200], packing=True),
        held_out_records=rows_of(examples[200:], packing=True),
        workdir=tmp_path,
        fingerprints={},
        devices=jax.devices()[:1],
    )
    (_, before), (last_step, after) = result.held_out_losses
    assert last_step == 4 * len(rows_of(examples[:200], packing=True)) // 8
    # Chance, where one of seven tokens and then the end is to be said, is log(7) / 2 = 0.97.
    assert after < 0.6 < before
