"""Every family against transformers: logits, of whole sequences, with a cache and in trees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from opt_deus_jax.errors import UserError
from opt_deus_jax.evaluation.packing import Scored, lay_out, pad_rows
from opt_deus_jax.evaluation.scoring import packed_hidden_states
from opt_deus_jax.models import language_model
from opt_deus_jax.models.families import FAMILIES
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.training.segments import plan_segments
from opt_deus_jax.training.weights import load_params
from opt_deus_jax.upscaling.identity import streamed_logits
from tests.families import VARIANTS, base, oracle
from tests.llama_checkpoints import oracle_logits, tokens

FLOAT32 = jnp.dtype("float32")


def params_of(source):
    config = read_model_config(source.hf_config)
    return config, load_params(
        source,
        config,
        plan_segments((frozenset(),) * config.num_layers, config.layer_kinds),
        dtype=FLOAT32,
        shardings=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    )


# The plain Llama is held to transformers in test_logits.py.
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "llama"])
def test_logits_equal_transformers(variant):
    source, tokens_BT = base(variant), tokens(length=40, vocabulary=64)
    expected = oracle_logits(oracle(variant), tokens_BT)
    assert expected.std() > 0.1
    config, params = params_of(source)
    full = jax.jit(functools.partial(language_model.logits, config=config, dtype=FLOAT32))
    np.testing.assert_allclose(full(params, tokens_BT), expected, rtol=0, atol=2e-4)
    np.testing.assert_allclose(streamed_logits(source, tokens_BT), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe"])
def test_grouped_experts_give_the_logits_of_transformers(variant):
    source, tokens_BT = base(variant), tokens(length=40, vocabulary=64)
    config, params = params_of(source)

    def grouped(params, tokens_BT):
        hidden_BTD = language_model.hidden_states(
            params, tokens_BT, config=config, dtype=FLOAT32, experts="grouped"
        )
        head = language_model.head_kernel(params, FLOAT32)
        return language_model.project_to_vocabulary(hidden_BTD, head, config.logits)

    expected = oracle_logits(oracle(variant), tokens_BT)
    np.testing.assert_allclose(jax.jit(grouped)(params, tokens_BT), expected, rtol=0, atol=2e-4)


# A window, a norm and a rotary embedding of each kind, and experts.
@pytest.mark.parametrize(
    "variant", ["qwen3", "smollm3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe"]
)
def test_a_cache_and_a_tree_give_the_logits_of_the_whole(variant):
    config, params = params_of(base(variant))
    tokens_BT = tokens(rows=2, length=12, vocabulary=64)
    # Two sequences in one row, alike in their first four tokens.
    tokens_BT[1, :4] = tokens_BT[0, :4]
    expected = oracle_logits(oracle(variant), tokens_BT)

    forward = jax.jit(
        functools.partial(language_model.cached_forward, config=config, dtype=FLOAT32)
    )
    cache = language_model.empty_cache(params, 2, 12, config=config, dtype=FLOAT32)
    places = jnp.arange(12)
    for first, last in ((0, 9), (9, 10), (10, 11), (11, 12)):
        new = jnp.arange(first, last)
        positions = jnp.broadcast_to(new[None], (2, last - first))
        allowed = jnp.broadcast_to((places[None] <= new[:, None])[None], (2, last - first, 12))
        made, cache = forward(
            params, tokens_BT[:, first:last], positions, allowed, cache, jnp.int32(first)
        )
        np.testing.assert_allclose(made, expected[:, last - 1], rtol=0, atol=2e-4)

    sequences = [Scored(tuple(row), tuple(row[1:]) + (0,)) for row in tokens_BT.tolist()]
    row = lay_out((0, 1), sequences)
    assert len(row.tokens) == 12 + 8
    arrays = pad_rows([row], 24)
    hidden_BTD = packed_hidden_states(
        params, arrays["tokens"], arrays["positions"], arrays["ends"], config=config, dtype=FLOAT32
    )
    head = language_model.head_kernel(params, FLOAT32)
    made = language_model.project_to_vocabulary(hidden_BTD, head, config.logits)
    for place, _, number in row.predictions:
        wanted = expected[number, row.positions[place]]
        np.testing.assert_allclose(made[0, place], wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_means_the_same_before_and_after_transformers(variant):
    config = oracle(variant).config
    assert read_model_config(config.to_dict()) == read_model_config(config.to_diff_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_fields_take_transformers_defaults(family):
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 48,
             "num_attention_heads": 32, "num_hidden_layers": 5}  # fmt: skip
    written = transformers.AutoConfig.for_model(family, **sizes).to_dict()
    assert read_model_config({"model_type": family, **sizes}) == read_model_config(written)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_qkv": 3.0}, "unknown field clip_qkv=3.0"),
        ({"attention_dropout": 0.5}, "field attention_dropout=0.5 is not supported"),
        ({"vocab_size": "64"}, "field vocab_size='64' must be a positive integer"),
    ],
)
def test_what_is_not_known_is_refused_by_name(family, change, message):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
             "num_attention_heads": 4, "num_hidden_layers": 2}  # fmt: skip
    with pytest.raises(UserError, match=message):
        read_model_config({"model_type": family, **sizes, **change})
