"""Routing, experts and their balance, each against transformers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from opt_deus_jax.config import TrainingConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.expert_config import ExpertConfig
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.moe import RouterLoad, balance_loss, no_load, route, sum_load
from opt_deus_jax.training.segments import TrainedNames
from opt_deus_jax.training.step import loss_fn, mean_loss_and_gradients
from tests.families import base, oracle
from tests.jaxprs import matmul_flops
from tests.llama_checkpoints import tokens
from tests.models.test_families import params_of
from tests.training.gradients import gradient_jaxpr

EXPERTS = ExpertConfig(number=6, per_token=2, width=5, is_normalized=True, balance=0.0)
QWEN3_MOE = {
    **{"model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48},
    **{"num_attention_heads": 4, "num_hidden_layers": 4},
}


@pytest.mark.parametrize("is_real", [None, [1, 1, 0, 1, 0, 1, 1]])
def test_the_balance_is_that_of_transformers_over_all_layers(is_real):
    logits_LME = np.random.default_rng(0).normal(0, 2, (3, 7, 6)).astype(np.float32)
    real_M = None if is_real is None else jnp.asarray(is_real, bool)
    load = no_load(EXPERTS)
    for logits_ME in logits_LME:
        routing = route(jnp.eye(7), jnp.asarray(logits_ME.T), EXPERTS)
        load = jax.tree.map(jnp.add, load, sum_load(routing, real_M))
    mask = None if is_real is None else torch.tensor([is_real])
    of_torch: Any = tuple(map(torch.from_numpy, logits_LME))
    expected = load_balancing_loss_func(of_torch, 6, 2, mask)
    np.testing.assert_allclose(balance_loss(load, EXPERTS), expected, rtol=1e-6)


def test_the_balance_is_least_where_experts_are_used_evenly():
    even = RouterLoad(jnp.full(6, 10.0), jnp.full(6, 5.0))
    np.testing.assert_allclose(balance_loss(even, EXPERTS), EXPERTS.per_token, rtol=1e-6)
    one_sided = RouterLoad(jnp.array([30.0, 30, 0, 0, 0, 0]), jnp.array([15.0, 15, 0, 0, 0, 0]))
    assert balance_loss(one_sided, EXPERTS) > 2 * EXPERTS.per_token


def test_only_the_chosen_experts_weigh_and_only_as_much_as_asked_for():
    x_MD = jnp.asarray(np.random.default_rng(1).normal(0, 1, (9, 8)), jnp.float32)
    router_ED = jnp.asarray(np.random.default_rng(2).normal(0, 1, (6, 8)), jnp.float32)
    routing = route(x_MD, router_ED, EXPERTS)
    assert (np.count_nonzero(routing.weights_ME, axis=1) == 2).all()
    np.testing.assert_array_equal(routing.weights_ME > 0, routing.chosen_ME == 1)
    np.testing.assert_allclose(routing.weights_ME.sum(axis=1), 1, rtol=1e-6)
    as_given = route(x_MD, router_ED, dataclasses.replace(EXPERTS, is_normalized=False))
    chosen = np.asarray(routing.chosen_ME) == 1
    np.testing.assert_array_equal(as_given.weights_ME[chosen], routing.probabilities_ME[chosen])


def test_the_balance_is_a_part_of_the_loss_only_where_config_json_asks_for_it():
    config, params = params_of(base("mixtral"))
    batch = {"tokens": jnp.asarray(tokens(4, 21, vocabulary=64))}
    everything = jax.tree.map(lambda leaf: None, params)
    losses = {}
    for wants in (True, False):
        fields = dict(base("mixtral").hf_config, output_router_logits=wants)
        asked = read_model_config(fields)
        assert asked.experts is not None
        assert asked.experts.balance == 0.5 * wants
        step = functools.partial(
            mean_loss_and_gradients, config=asked, training=TrainingConfig(batch_size=4)
        )
        losses[wants], _ = jax.jit(step)(params, everything, batch)
    evaluated = functools.partial(loss_fn, config=config, training=TrainingConfig())
    weights_BT = jnp.full((4, 20), 1 / 80)
    # Held-out text is predicted, not balanced.
    predicted = jax.jit(evaluated)(params, everything, batch, weights_BT)
    np.testing.assert_allclose(predicted, losses[False], rtol=1e-6)
    tokens_BT = torch.from_numpy(np.asarray(batch["tokens"][:, :-1], np.int64))
    with torch.no_grad():
        balance = oracle("mixtral")(tokens_BT).aux_loss.item()
    np.testing.assert_allclose(losses[True] - losses[False], 0.5 * balance, rtol=1e-5)


def test_the_parts_of_a_batch_are_balanced_one_by_one():
    config, params = params_of(base("mixtral"))
    frozen = jax.tree.map(lambda leaf: None, params)
    rows = tokens(4, 21, vocabulary=64)

    def loss(rows_BL, parts):
        training = TrainingConfig(batch_size=len(rows_BL), accumulation_steps=parts)
        step = functools.partial(mean_loss_and_gradients, config=config, training=training)
        return jax.jit(step)(params, frozen, {"tokens": jnp.asarray(rows_BL)})[0]

    halves = (loss(rows[0::2], 1) + loss(rows[1::2], 1)) / 2
    np.testing.assert_allclose(loss(rows, 2), halves, rtol=1e-6)
    assert abs(loss(rows, 1) - halves) > 1e-5


def test_without_a_balance_nothing_is_summed_for_it():
    config = read_model_config(dict(QWEN3_MOE, num_local_experts=4, num_experts_per_tok=1))
    assert config.experts is not None
    names = TrainedNames(frozenset(), (frozenset(),) * 4)
    jaxpr = gradient_jaxpr(config, names, TrainingConfig(), 2, 6)
    assert matmul_flops(jaxpr) > 0
    # The carry of the scan over layers is the residual stream alone.
    (scan, *_) = (e for e in jaxpr.eqns if e.primitive.name == "scan")
    assert scan.params["num_carry"] == 1


def test_both_names_of_the_number_are_read():
    written = transformers.AutoConfig.for_model(**QWEN3_MOE, num_experts=4, num_experts_per_tok=2)
    config = read_model_config(dict(QWEN3_MOE, num_experts=4, num_experts_per_tok=2))
    assert "num_local_experts" in written.to_dict()
    assert config == read_model_config(written.to_dict())
    assert config.experts is not None
    assert config.experts.number == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 4, "num_local_experts": 8}, "num_experts=4 and num_local_experts=8 contr"),
        ({"num_experts": 0}, "num_local_experts=0 must be a positive integer"),
        ({"num_experts": 4}, "num_experts_per_tok=8 exceeds the 4 experts"),
        ({"moe_intermediate_size": "7"}, "moe_intermediate_size='7' must be a positive integer"),
        ({"router_aux_loss_coef": -1}, "router_aux_loss_coef=-1 must be 0 or more"),
        ({"output_router_logits": 1}, "output_router_logits=1 must be true or false"),
        ({"norm_topk_prob": None}, "norm_topk_prob=None must be true or false"),
        ({"mlp_only_layers": [4]}, r"mlp_only_layers=\[4\] must be a list of depths from 0 to 3"),
        ({"mlp_only_layers": 2}, "mlp_only_layers=2 must be a list"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0 must be a positive integer"),
        ({"shared_expert_intermediate_size": 3}, "unknown field shared_expert_intermediate_size=3"),
        ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not"),
        ({"model_type": "mixtral", "norm_topk_prob": True}, "unknown field norm_topk_prob"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message) as caught:
        read_model_config({**QWEN3_MOE, **change})
    assert "\n" not in str(caught.value)
