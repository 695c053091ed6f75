"""Logits against transformers' LlamaForCausalLM."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.initialization import no_init_weights
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from opt_deus_jax.checkpoints.tokenizer import load_tokenizer
from opt_deus_jax.models import language_model
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import block_specs, outer_specs
from opt_deus_jax.models.rope import inverse_frequencies
from opt_deus_jax.upscaling.identity import streamed_logits
from tests.llama_checkpoints import (
    LLAMA3_ROPE,
    hf_config,
    oracle_logits,
    oracle_model,
    params_of,
    random_tensors,
    smollm2,
    source_of,
    tokens,
)

full_logits = jax.jit(language_model.logits, static_argnames=("config", "dtype"))
VARIANTS = {
    "tied_gqa": {},
    "untied_mha": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "one_kv_head": {"num_key_value_heads": 1, "rms_norm_eps": 0.1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide_heads": {"head_dim": 24},
    "linear_rope": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 500.0},
    "llama3_rope": {"rope_scaling": LLAMA3_ROPE, "head_dim": 16, "rope_theta": 500.0},
}


# Without an original context, which is then that of the model.
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant):
    config = hf_config(num_hidden_layers=3, **VARIANTS[variant])
    tensors = random_tensors(config, scale=0.15)
    source, tokens_BT = source_of(config, tensors), tokens(length=60)
    expected = oracle_logits(oracle_model(config, tensors), tokens_BT)
    assert np.abs(expected).max() > 1
    options = {"config": read_model_config(config), "dtype": jnp.float32}
    ours = full_logits(params_of(source), tokens_BT, **options)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-4)
    np.testing.assert_allclose(streamed_logits(source, tokens_BT), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "name", ["default", "linear", "llama3", "yarn", "yarn_mscale", "yarn_flat"]
)
def test_rotary_frequencies_equal_transformers(name):
    scaling = {
        "default": None,
        "linear": {"rope_type": "linear", "factor": 8.0},
        "llama3": LLAMA3_ROPE | {"factor": 32.0, "original_max_position_embeddings": 8192},
        "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
        "yarn_mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 20},
        "yarn_flat": YARN | {"attention_factor": 0.9, "truncate": False, "beta_slow": 0.5},
    }[name]
    config = hf_config(head_dim=128, rope_theta=500000.0, rope_scaling=scaling)
    oracle = transformers.LlamaConfig(**config)
    if name == "default":
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(oracle)
        expected = rotary.inv_freq
    else:
        kind = name.split("_")[0]
        expected, factor = ROPE_INIT_FUNCTIONS[kind](oracle, torch.device("cpu"))
        np.testing.assert_allclose(read_model_config(config).ropes[0].table_factor, factor)
    ours = inverse_frequencies(read_model_config(config).ropes[0], 128)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)


@functools.cache
def real_tokens():
    source = smollm2()
    tokenizer = load_tokenizer(source.side_files, source.hf_config, source.name)
    return np.asarray([tokenizer.encode(str(np.einsum.__doc__))[:256]], np.int32)


def test_smollm2_equals_transformers_on_256_real_tokens():
    source = smollm2()
    with no_init_weights():
        model = oracle_model(source.hf_config, {n: source.read(n) for n in source.tensors})
    expected = oracle_logits(model, real_tokens())
    ours = streamed_logits(source, real_tokens())
    assert ours.shape == (1, 256, 49152)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-4)
    # The weights are those of a language model, not noise.
    surprise = -np.asarray(jax.nn.log_softmax(ours[0, :-1]))[np.arange(255), real_tokens()[0, 1:]]
    assert surprise.mean() < 4


def test_segments_of_several_patterns_are_the_same_network():
    config = hf_config()
    source = source_of(config, random_tensors(config))
    params, tokens_BT = params_of(source), tokens()
    [[stacked]] = params["segments"]

    def layers(*indices):
        return jax.tree.map(lambda x: x[np.asarray(indices)], stacked)

    cut = params | {"segments": [[layers(0, 1)], [layers(2, 4), layers(3, 5)]]}
    options = {"config": read_model_config(config), "dtype": jnp.float32}
    expected = full_logits(params, tokens_BT, **options)
    np.testing.assert_allclose(full_logits(cut, tokens_BT, **options), expected, atol=1e-6)


def test_bfloat16_is_near_float32_and_remat_changes_nothing():
    config = hf_config(num_hidden_layers=3)
    params = params_of(source_of(config, random_tensors(config)))
    tokens_BT = jnp.asarray(tokens())
    shape = read_model_config(config)
    exact = full_logits(params, tokens_BT, config=shape, dtype=jnp.float32)
    rough = full_logits(params, tokens_BT, config=shape, dtype=jnp.bfloat16)
    assert rough.dtype == jnp.float32
    assert 0 < jnp.abs(rough - exact).max() < 0.05 * jnp.abs(exact).max()

    @functools.partial(jax.jit, static_argnames="remat")
    def gradient(params, remat):
        def total(params):
            hidden = language_model.hidden_states(
                params, tokens_BT, config=shape, dtype=jnp.dtype("float32"), remat=remat
            )
            return jnp.sum(jnp.sin(hidden))

        return jax.grad(total)(params)

    for plain, again in zip(
        *(jax.tree.leaves(gradient(params, remat)) for remat in ("none", "block")), strict=True
    ):
        np.testing.assert_allclose(again, plain, rtol=1e-4, atol=1e-4)


def test_init_draws_each_parameter_as_its_spec_says():
    config = read_model_config(
        hf_config(
            hidden_size=64,
            intermediate_size=256,
            attention_bias=True,
            tie_word_embeddings=False,
            initializer_range=0.05,
        )  # fmt: skip
    )
    params = jax.jit(lambda key: language_model.init_params(config, key))(jax.random.key(0))
    [[stacked]] = params.pop("segments")
    assert stacked.keys() == block_specs(config).keys()
    assert params.keys() == outer_specs(config).keys()
    specs = {**block_specs(config), **outer_specs(config)}
    for name, array in {**stacked, **params}.items():
        spec = specs[name]
        assert array.shape == ((6, *spec.shape) if name in stacked else spec.shape)
        assert array.dtype == jnp.float32
        if spec.init == "normal":
            # The error of a deviation estimated from n draws is 1 / sqrt(2 n).
            assert abs(array.std() / 0.05 - 1) < 4 / np.sqrt(2 * array.size)
        else:
            np.testing.assert_array_equal(array, float(spec.init == "ones"))
    assert not np.array_equal(stacked["gate_kernel"][0], stacked["gate_kernel"][1])
    assert not np.array_equal(params["embedding"], params["head"])
