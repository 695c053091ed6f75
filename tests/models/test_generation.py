"""Cached decoding against the full forward pass, sampling, and transformers' generate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from opt_deus_jax.models import language_model
from opt_deus_jax.models.generation import generate, sample_token
from opt_deus_jax.models.model_config import read_model_config
from tests.llama_checkpoints import (
    hf_config,
    oracle_model,
    params_of,
    random_tensors,
    source_of,
    tokens,
)

CONFIG = hf_config(num_hidden_layers=3)
SHAPE = read_model_config(CONFIG)
FLOAT32 = jnp.dtype("float32")
PROMPTS = [[5, 17, 3], [8, 60, 61, 2, 9, 33, 12], [44]]


@functools.cache
def weights():
    return random_tensors(CONFIG, scale=0.3)


@pytest.fixture(scope="module")
def params():
    return params_of(source_of(CONFIG, weights()))


@functools.cache
def greedy_by_transformers(max_new_tokens):
    model = oracle_model(CONFIG, weights())
    rows = []
    for prompt in PROMPTS:
        made = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        rows.append(made[0, len(prompt) :].tolist())
    return rows


def test_prefill_and_decoding_equal_the_full_forward(params):
    tokens_BT = jnp.asarray(tokens(rows=2, length=12))
    full = jax.jit(functools.partial(language_model.logits, config=SHAPE, dtype=FLOAT32))
    expected = full(params, tokens_BT)
    forward = jax.jit(functools.partial(language_model.cached_forward, config=SHAPE, dtype=FLOAT32))
    cache = language_model.empty_cache(params, 2, 16, config=SHAPE, dtype=FLOAT32)
    positions = np.broadcast_to(np.arange(12), (2, 12))
    start = 0
    for length in (9, 1, 1, 1):
        stop = start + length
        allowed = np.arange(16)[None] <= np.arange(start, stop)[:, None]
        last, cache = forward(
            params,
            tokens_BT[:, start:stop],
            positions[:, start:stop],
            np.broadcast_to(allowed, (2, length, 16)),
            cache,
            jnp.int32(start),
        )
        np.testing.assert_allclose(last, expected[:, stop - 1], rtol=0, atol=2e-5)
        start = stop
    assert start == 12


def test_a_batch_of_prompts_of_any_length_is_continued_as_transformers_does(params):
    expected = greedy_by_transformers(12)
    made = generate(params, PROMPTS, config=SHAPE, max_new_tokens=12, eos_ids=())
    assert made == expected
    assert len({tuple(row) for row in made}) == 3


def test_a_row_stops_at_the_first_of_its_end_tokens_and_the_others_go_on(params):
    plain = greedy_by_transformers(12)
    ends = (plain[0][7], plain[0][4])
    made = generate(params, PROMPTS, config=SHAPE, max_new_tokens=12, eos_ids=ends)
    for row, whole in zip(made, plain, strict=True):
        stop = min((whole.index(end) for end in ends if end in whole), default=12)
        assert row == whole[:stop]
    assert len(made[0]) <= 4
    assert max(map(len, made)) == 12


def test_sampled_text_is_of_its_seed(params):
    options = {"config": SHAPE, "max_new_tokens": 12, "eos_ids": (), "temperature": 1.5}
    first, again, other = (generate(params, PROMPTS, seed=seed, **options) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first != greedy_by_transformers(12)


def test_an_empty_prompt_is_refused(params):
    with pytest.raises(ValueError, match="a prompt is empty"):
        generate(params, [[1], []], config=SHAPE, max_new_tokens=1, eos_ids=(0,))


PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.3, 0.15], np.float32)


def draws(temperature, top_p, count=4000):
    logits_BV = jnp.broadcast_to(jnp.log(PROBABILITIES)[None] + 7.0, (count, 5))
    made = sample_token(logits_BV, jax.random.key(0), temperature=temperature, top_p=top_p)
    assert made.dtype == jnp.int32
    return np.bincount(np.asarray(made), minlength=5) / count


def test_temperature_zero_takes_the_most_likely():
    np.testing.assert_array_equal(draws(0.0, 0.5), [0, 1, 0, 0, 0])


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [(0.2, [1]), (0.39, [1]), (0.5, [1, 3]), (0.69, [1, 3]), (0.72, [1, 3, 4]), (1.0, range(5))],
)
def test_top_p_draws_from_the_smallest_set_that_reaches_it(top_p, nucleus):
    kept = np.isin(np.arange(5), nucleus)
    expected = PROBABILITIES * kept / (PROBABILITIES * kept).sum()
    # Four standard errors of a share of 4000 draws.
    assert np.abs(draws(1.0, top_p) - expected).max() < 4 * np.sqrt(0.25 / 4000)
    np.testing.assert_array_equal(draws(1.0, top_p) > 0, kept)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    powered = PROBABILITIES ** (1 / temperature)
    error = np.abs(draws(temperature, 1.0) - powered / powered.sum()).max()
    assert error < 4 * np.sqrt(0.25 / 4000)


def test_each_row_has_its_own_nucleus():
    logits_BV = jnp.asarray([[9.0, 0.0, 0.0], [0.0, 0.0, 9.0], [1.0, 1.0, 1.0]])
    keys = jax.random.split(jax.random.key(0), 200)
    pick = jax.jit(jax.vmap(lambda key: sample_token(logits_BV, key, temperature=1.0, top_p=0.9)))
    made = np.asarray(pick(keys))
    assert (made[:, 0] == 0).all()
    assert (made[:, 1] == 2).all()
    assert set(made[:, 2]) == {0, 1, 2}
