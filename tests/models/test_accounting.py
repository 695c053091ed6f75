import jax
import pytest

from opt_deus_jax.models.accounting import count_costs
from opt_deus_jax.models.language_model import init_params
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.upscaling.layout import plan_layout
from tests.llama_checkpoints import hf_config

LLAMA_1B = hf_config(vocab_size=128256, hidden_size=2048, intermediate_size=8192,
                     num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
                     head_dim=64, tie_word_embeddings=True)  # fmt: skip
LLAMA_8B = hf_config(vocab_size=128256, hidden_size=4096, intermediate_size=14336,
                     num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                     tie_word_embeddings=False)  # fmt: skip


def costs(config, is_trained, outer_trained=False, length=8):
    return count_costs(
        read_model_config(config),
        is_trained,
        outer_trained=outer_trained,
        sequence_length=length,
        frozen_bytes=2,
    )


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
    assert costs(config, [True] * depth, outer_trained=True).trained_parameters == base
    assert costs(config, [False] * depth).parameters == base


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_parameters_are_those_that_init_makes(tied, biases):
    config = hf_config(tie_word_embeddings=tied, attention_bias=biases, mlp_bias=biases)
    made = jax.eval_shape(lambda: init_params(read_model_config(config), jax.random.key(0)))
    assert costs(config, [True] * 6).parameters == sum(leaf.size for leaf in jax.tree.leaves(made))


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
    assert counted.expansion_bytes == 4 * (3 * (block + 8) + 4 * 6**2 + 10 * 4)

    everything = costs(config, [True] * 3, outer_trained=True, length=3)
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
    assert costs(LLAMA_1B, [False] * 16).backward_flops == 0
