import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
import transformers
from jax.interpreters.partial_eval import dce_jaxpr

from opt_deus_jax.config import TrainingConfig
from opt_deus_jax.models.accounting import Costs, count_costs
from opt_deus_jax.models.block import root_mean_square_norm
from opt_deus_jax.models.language_model import (
    apply_block,
    causal_inputs,
    init_params,
    project_to_vocabulary,
)
from opt_deus_jax.models.model_config import ModelConfig, read_model_config
from opt_deus_jax.models.params import block_specs, outer_specs
from opt_deus_jax.training.segments import TrainedNames, select_trained
from opt_deus_jax.upscaling.layout import plan_layout
from tests.jaxprs import matmul_flops
from tests.llama_checkpoints import hf_config
from tests.training.gradients import abstract, gradient_jaxpr

LLAMA_1B = hf_config(vocab_size=128256, hidden_size=2048, intermediate_size=8192,
                     num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
                     head_dim=64, tie_word_embeddings=True)  # fmt: skip
LLAMA_8B = hf_config(vocab_size=128256, hidden_size=4096, intermediate_size=14336,
                     num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                     tie_word_embeddings=False)  # fmt: skip
BATCH, LENGTH = 2, 6


def costs_of(
    config: ModelConfig,
    names: TrainedNames,
    length: int = LENGTH,
    remat: str = "none",
    experts: str = "dense",
) -> Costs:
    return count_costs(
        config,
        names.outer,
        names.blocks,
        sequence_length=length,
        frozen_bytes=2,
        remat=remat,
        experts=experts,
    )


def costs(config: dict[str, Any], is_new: Sequence[bool], trained: str = "new", length: int = 8):
    model = read_model_config(config)
    if trained == "nothing":
        return costs_of(model, TrainedNames(frozenset(), (frozenset(),) * len(is_new)), length)
    return costs_of(model, select_trained(model, is_new, trained), length)


@pytest.mark.parametrize(
    ("config", "num_new", "base", "grown"),
    [
        (LLAMA_1B, 8, 1_235_814_400, 1_722_386_432),
        (LLAMA_8B, 16, 8_030_261_248, 11_520_053_248),
    ],
)
def test_the_published_sizes_are_met_exactly(config, num_new, base, grown):
    depth = config["num_hidden_layers"]
    layers = plan_layout("top", depth, num_new)
    counted = costs(config, [layer.is_new for layer in layers])
    assert counted.parameters == grown
    assert counted.trained_parameters == grown - base
    assert costs(config, [False] * depth, "all").trained_parameters == base
    assert costs(config, [False] * depth, "nothing").parameters == base


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_parameters_are_those_that_init_makes(tied, biases):
    config = hf_config(tie_word_embeddings=tied, attention_bias=biases, mlp_bias=biases)
    made = jax.eval_shape(lambda: init_params(read_model_config(config), jax.random.key(0)))
    total = sum(leaf.size for leaf in jax.tree.leaves(made))
    assert costs(config, [True] * 6).parameters == total
    assert costs(config, [True] * 6, "weight|bias").trained_parameters == total
    norms = [
        leaf for path, leaf in jax.tree.leaves_with_path(made) if path[-1].key.endswith("norm")
    ]
    assert costs(config, [True] * 6, "norm").trained_parameters == sum(x.size for x in norms)


def test_a_small_example_counted_by_hand():
    # Width 4, MLP 6, 2 heads of 2 with one KV head, vocabulary 10, sequences of 3.
    config = hf_config(vocab_size=10, hidden_size=4, intermediate_size=6, num_attention_heads=2,
                       num_key_value_heads=1)  # fmt: skip
    block = 4 * 4 + 2 * 4 + 2 * 4 + 4 * 4 + 3 * 4 * 6  # multiply-adds: q, k, v, o, MLP
    block_flops = 2 * block
    attention_flops = 2 * (3 * 4 + 3 * 4)  # 3 keys, scores and weighted sum over 2 heads of 2
    head_flops = 2 * 10 * 4
    parameters = 3 * (block + 2 * 4) + 10 * 4 + 4

    counted = costs(config, [False, True, False], length=3)
    assert counted.parameters == parameters
    assert counted.trained_parameters == block + 2 * 4
    assert counted.forward_flops == 3 * (block_flops + attention_flops) + head_flops
    # To the input of layer 1 through layers 2 and 1, and once more for layer 1's kernels.
    assert counted.backward_flops == (
        head_flops + 2 * (block_flops + 2 * attention_flops) + block_flops
    )
    assert counted.training_bytes == 2 * (parameters - block - 8) + 16 * (block + 8)

    everything = costs(config, [False] * 3, "all", length=3)
    assert everything.trained_parameters == parameters
    assert everything.backward_flops == 2 * everything.forward_flops
    assert everything.training_bytes == 16 * parameters


def test_new_layers_at_the_top_take_a_shorter_backward_pass():
    backward = {
        layout: costs(LLAMA_1B, [o.is_new for o in plan_layout(layout, 16, 4)]).backward_flops
        for layout in ("top", "middle", "bottom", "uniform")
    }
    assert backward["top"] < backward["middle"] < backward["bottom"]
    assert backward["top"] < backward["uniform"] < backward["bottom"]
    assert (
        costs(LLAMA_1B, [False] * 16, "nothing").model_flops
        == costs(LLAMA_1B, [True] * 16).forward_flops
    )


TINY = read_model_config(
    hf_config(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        attention_bias=True,
    )  # fmt: skip
)
TIED = read_model_config(
    hf_config(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )  # fmt: skip
)


def placed(layout: str) -> list[bool]:
    return [origin.is_new for origin in plan_layout(layout, 6, 2)]


def flops_of_the_step(
    config: ModelConfig, names: TrainedNames, remat: str = "none", experts: str = "dense"
) -> int:
    """A token's matrix products in the loss and gradients that are trained with."""
    training = TrainingConfig(remat=remat, experts=experts)
    jaxpr = gradient_jaxpr(config, names, training, BATCH, LENGTH)
    # Rules for gradients that are our own make those of frozen kernels too, which XLA leaves out.
    used, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return matmul_flops(used) // (BATCH * LENGTH)


@functools.cache
def flops_that_are_needed(config: ModelConfig, names: TrainedNames) -> int:
    """The same of a network without scans and with plain cross-entropy."""
    outer, kinds = outer_specs(config), config.kinds_of(len(names.blocks))
    params = {("", name): abstract(spec.shape) for name, spec in outer.items()}
    for depth in range(len(names.blocks)):
        specs = block_specs(config, kinds[depth])
        params |= {(str(depth), name): abstract(spec.shape) for name, spec in specs.items()}
    is_trained = {
        (where, name): name in (names.blocks[int(where)] if where else names.outer)
        for where, name in params
    }

    def loss(trained: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        merged = trained | frozen
        positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], (BATCH, LENGTH))
        inputs = causal_inputs(config, positions)
        x = merged["", "embedding"][tokens[:, :-1]]
        # Blocks of a kind are traced once.
        apply = {kind: jax.jit(functools.partial(apply_block, config, kind)) for kind in kinds}
        for depth, kind in enumerate(kinds):
            block = {name: merged[str(depth), name] for name in block_specs(config, kind)}
            x, _ = apply[kind](block, x, inputs)
        x = root_mean_square_norm(x, merged["", "final_norm"], config.norm)
        head = merged.get(("", "head"), merged["", "embedding"])
        logits = project_to_vocabulary(x, head, config.logits)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(losses)

    trained = {key: params[key] for key in params if is_trained[key]}
    frozen = {key: params[key] for key in params if not is_trained[key]}
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH + 1), jnp.int32)
    closed = jax.make_jaxpr(jax.value_and_grad(loss))(trained, frozen, tokens)
    used, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return matmul_flops(used) // (BATCH * LENGTH)


SELECTIONS = [
    *(("new", layout) for layout in ("top", "middle", "bottom", "top_and_bottom", "uniform")),
    *(("new", "stack"), ("all", "stack"), ("norm|mlp", "top"), ("layernorm|bias", "top")),
    *(("embed_tokens", "top"), (r"lm_head|[3-7].*(input_layernorm|q_proj)", "top")),
]


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(("trained", "layout"), SELECTIONS)
def test_flops_are_those_of_the_step(config: ModelConfig, trained: str, layout: str):
    names = select_trained(config, placed(layout), trained)
    counted = costs_of(config, names)
    assert counted.model_flops == flops_that_are_needed(config, names)
    assert counted.model_flops == flops_of_the_step(config, names)


PARTS = [
    *("q_proj", "k_proj.weight", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("q_proj.bias", "input_layernorm", "post_attention_layernorm", "self_attn", "q_proj|v_proj"),
]


@pytest.mark.parametrize("part", PARTS)
def test_flops_of_a_part_of_the_lowest_block_are_those_needed(part: str):
    names = select_trained(TINY, [False] * 4, rf"layers\.[13].*({part})")
    counted = costs_of(TINY, names)
    assert counted.model_flops == flops_that_are_needed(TINY, names)
    # A scan asks its lowest block for the gradient of its input, which nothing needs.
    frozen, lowest, *upper = names.blocks
    as_scanned = TrainedNames(names.outer, (frozen, lowest | {"input_norm"}, *upper))
    assert costs_of(TINY, as_scanned).model_flops == flops_of_the_step(TINY, names)


QKV = ("query", "key", "value")
SIZES = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 8,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
# Norms after the projections, of queries and keys, and for one layers of two kinds.
OLMO2 = read_model_config({"model_type": "olmo2", **SIZES})
GEMMA3 = read_model_config({
    **{"model_type": "gemma3_text", **SIZES, "head_dim": 4, "sliding_window": LENGTH},
    "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"] * 2,
})  # fmt: skip


# Layers with experts, and layers with one MLP.
EXPERT_FIELDS = {
    **{"model_type": "qwen3_moe", **SIZES, "head_dim": 4, "mlp_only_layers": [1, 3]},
    **{"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 5},
}
EXPERTS = read_model_config(EXPERT_FIELDS)


@pytest.mark.parametrize("experts", ["dense", "grouped"])
@pytest.mark.parametrize("remat", ["none", "block"])
@pytest.mark.parametrize("trained", ["new", "all", "mlp.gate.weight|input", "experts|input"])
def test_flops_of_experts_are_those_of_the_step(trained: str, remat: str, experts: str):
    names = select_trained(EXPERTS, placed("middle"), trained)
    if trained not in ("new", "all"):
        whole = frozenset(block_specs(EXPERTS.of_layer(0)))
        names = TrainedNames(names.outer, (whole, *names.blocks[1:]))
    counted = costs_of(EXPERTS, names, remat=remat, experts=experts)
    assert (counted.idle_expert_flops > 0) == (experts == "dense")
    step = flops_of_the_step(EXPERTS, names, remat, experts)
    made = counted.model_flops + counted.recomputed_flops + counted.idle_expert_flops
    assert made == step


@pytest.mark.parametrize("trained", ["new", "all", "mlp.gate.weight|input", "experts|input"])
def test_flops_of_experts_that_all_tokens_go_to_are_those_needed(trained: str):
    everywhere = read_model_config({**EXPERT_FIELDS, "num_experts_per_tok": 3})
    names = select_trained(everywhere, placed("middle"), trained)
    counted = costs_of(everywhere, names)
    assert counted.idle_expert_flops == 0
    assert counted.model_flops == flops_that_are_needed(everywhere, names)


def test_experts_a_token_is_not_sent_to_are_not_active():
    experts = 8 * 3 * 14336 * 4096
    mixtral = read_model_config({
        **{"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096},
        **{"intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    })  # fmt: skip
    counted = costs_of(mixtral, TrainedNames(frozenset(), (frozenset(),) * 32))
    # As published with Mixtral 8x7B: 47B, of which 13B are active.
    with torch.device("meta"):
        whole = transformers.MixtralForCausalLM(transformers.MixtralConfig())
    total = sum(parameter.numel() for parameter in whole.parameters())
    assert counted.parameters == total == 46_702_792_704
    assert counted.parameters - counted.active_parameters == 32 * experts * 6 // 8
    idle = read_model_config({
        **{"model_type": "qwen3_moe", **SIZES, "num_experts": 7, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 5},
    })  # fmt: skip
    busy = dataclasses.replace(
        idle,
        experts=dataclasses.replace(idle.experts, number=2),  # pyright: ignore
    )
    names = TrainedNames(frozenset(), (frozenset(),) * 8)
    rows = 8 * 5 * 8
    assert costs_of(idle, names).active_parameters == costs_of(busy, names).parameters + rows
    difference = costs_of(idle, names).forward_flops - costs_of(busy, names).forward_flops
    assert difference == 2 * rows


@pytest.mark.parametrize("config", [OLMO2, GEMMA3], ids=["olmo2", "gemma3"])
@pytest.mark.parametrize("trained", ["new", "all", "_norm", "post_feedforward", "q_norm|v_proj"])
@pytest.mark.parametrize("remat", ["none", "block"])
def test_flops_of_other_families_are_those_of_the_step(
    config: ModelConfig, trained: str, remat: str
):
    # In the last three the lowest block is trained whole, which is as a scan takes it.
    names = select_trained(config, placed("middle"), trained)
    if trained in ("_norm", "post_feedforward", "q_norm|v_proj"):
        whole = frozenset(block_specs(config))
        names = TrainedNames(names.outer, (whole, *names.blocks[1:]))
    counted = costs_of(config, names, remat=remat)
    assert counted.model_flops == flops_that_are_needed(config, names)
    step = flops_of_the_step(config, names, remat)
    if "input_norm" not in block_specs(config) and trained != "all":
        # A scan asks its lowest block for the gradient of its input, which nothing needs.
        step -= sum(2 * block_specs(config)[f"{name}_kernel"].size for name in QKV)
    assert counted.model_flops + counted.recomputed_flops == step


@pytest.mark.parametrize("part", ["q_norm", "k_norm", "attention_layernorm", "feedforward"])
def test_flops_of_a_norm_of_the_lowest_block_are_those_needed(part: str):
    names = select_trained(OLMO2, [False] * 8, rf"layers\.[13].*{part}")
    counted = costs_of(OLMO2, names)
    assert counted.model_flops == flops_that_are_needed(OLMO2, names)


def test_a_window_counts_the_pairs_within_it():
    def forward(window: int) -> int:
        config = {"model_type": "mistral", **SIZES, "sliding_window": window}
        return costs(config, [False] * 8, "nothing", length=8).forward_flops

    pair = 2 * 2 * 8  # multiply-adds of the score and of the weighted sum, of all heads
    assert forward(8) == forward(100)
    assert forward(8) - forward(5) == 8 * 3 * pair


@pytest.mark.parametrize("outer", ["lm_head", "model.norm", "model.norm|lm_head", "embed_tokens"])
def test_flops_of_the_outer_parameters_are_those_needed(outer: str):
    names = select_trained(TINY, [False] * 4, outer)
    assert costs_of(TINY, names).model_flops == flops_that_are_needed(TINY, names)


@pytest.mark.parametrize(
    ("trained", "layout", "remat"),
    [
        *(("new", "top", remat) for remat in ("matmuls", "block")),
        *(("new", "middle", remat) for remat in ("matmuls", "block")),
        *(("all", "stack", remat) for remat in ("matmuls", "block")),
        *(("norm", "top", remat) for remat in ("matmuls", "block")),
    ],
)
def test_what_is_computed_twice_is_counted_apart(trained: str, layout: str, remat: str):
    names = select_trained(TINY, placed(layout), trained)
    counted = costs_of(TINY, names, remat=remat)
    assert counted.model_flops == costs_of(TINY, names).model_flops
    assert counted.recomputed_flops > 0
    assert counted.model_flops + counted.recomputed_flops == flops_of_the_step(TINY, names, remat)
