import pytest
import transformers

from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import grown_hf_config, read_model_config
from opt_deus_jax.models.rope import RopeConfig
from tests.llama_checkpoints import LLAMA3_ROPE, hf_config


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, RopeConfig(500000.0)),
        ({"type": "linear", "factor": 4.0}, RopeConfig(500000.0, "linear", 4.0)),
        ({"rope_type": "linear", "factor": 4.0}, RopeConfig(500000.0, "linear", 4.0)),
        (
            {"type": "llama3"} | {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_type"},
            RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 32),
        ),
    ],
)
def test_both_styles_of_rope_fields_mean_the_same(scaling, expected):
    old = hf_config(rope_theta=500000.0, rope_scaling=scaling)
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")}
    new_scaling: dict = dict(scaling or {"rope_type": "default"})
    new_scaling["rope_type"] = new_scaling.pop("type", new_scaling.get("rope_type"))
    new["rope_parameters"] = new_scaling | {"rope_theta": 500000.0}
    assert read_model_config(old).ropes == (expected,)
    assert read_model_config(new) == read_model_config(old)
    # What transformers 5 itself makes of the old style.
    written = transformers.LlamaConfig(**old).to_dict()
    assert "rope_parameters" in written
    assert "rope_theta" not in written
    assert read_model_config(written) == read_model_config(old)


def test_every_field_is_read():
    config = read_model_config(
        hf_config(head_dim=10, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    )
    assert (config.vocabulary_size, config.width, config.mlp_width) == (97, 32, 48)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (6, 4, 2)
    assert (config.head_dim, config.max_positions, config.norm.epsilon) == (10, 128, 1e-5)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, True, True)
    assert not config.tied_embeddings
    assert config.initializer_range == 0.02


def test_absent_fields_take_transformers_defaults():
    optional = ("num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling",
                "tie_word_embeddings", "attention_bias", "mlp_bias", "initializer_range",
                "max_position_embeddings", "hidden_act")  # fmt: skip
    bare = {k: v for k, v in hf_config().items() if k not in optional}
    oracle = transformers.LlamaConfig(**bare)
    assert read_model_config(bare) == read_model_config(oracle.to_dict())
    assert read_model_config(bare).num_kv_heads == 4
    assert read_model_config(bare).head_dim == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": None}, "rope_theta=None"),
        ({"rope_scaling": "llama3"}, "rope_scaling='llama3' must be an object"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads='2' must be an integer"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small' must be a number"),
        ({"model_type": "gpt2"}, "architecture model_type='gpt2'"),
        ({"model_type": None}, "architecture model_type=None"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, r"'linear' needs exactly .*'factor'.* found \[\]"),
        ({"rope_scaling": LLAMA3_ROPE | {"beta": 1}}, "rope type 'llama3' needs .*'beta'"),
        ({"hidden_act": "gelu"}, "field hidden_act='gelu'"),
        ({"attention_dropout": 0.1}, "field attention_dropout=0.1"),
        ({"pretraining_tp": 2}, "field pretraining_tp=2"),
        ({"sliding_window": 4096}, "field sliding_window=4096"),
        ({"quantization_config": {"bits": 4}}, "field quantization_config="),
        ({"qk_norm": True}, "unknown field qk_norm=True"),
        ({"layer_types": ["full_attention"]}, "unknown field layer_types="),
        ({"num_attention_heads": 1}, "num_attention_heads=1 is not a multiple of num_key_value"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"vocab_size": 0}, "field vocab_size=0 must be a positive integer"),
        ({"hidden_size": 3.5}, "field hidden_size=3.5 must be a positive integer"),
        ({"num_hidden_layers": None}, "field num_hidden_layers=None must be a positive"),
        ({"intermediate_size": "48"}, "field intermediate_size='48' must be a positive"),
        ({"num_attention_heads": -4}, "field num_attention_heads=-4 must be a positive"),
        ({"rms_norm_eps": 0.0}, "field rms_norm_eps=0.0 must be positive"),
        ({"rms_norm_eps": float("inf")}, "field rms_norm_eps=inf must be positive"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message) as caught:
        read_model_config(hf_config(**change), "some/config.json")
    assert str(caught.value).startswith("some/config.json: ")
    assert "\n" not in str(caught.value)


def test_a_width_that_heads_do_not_divide_needs_a_head_dim():
    config = hf_config(hidden_size=36, num_attention_heads=8, num_key_value_heads=8)
    with pytest.raises(UserError, match="hidden_size=36 .*num_attention_heads=8"):
        read_model_config(config)
    assert read_model_config(config | {"head_dim": 4}).head_dim == 4


def test_growing_changes_the_depth_alone():
    base = hf_config()
    grown = grown_hf_config(base, (0, 1, 2, 3, 4, 4, 5, 5, 5))
    assert {k for k in base if base[k] != grown[k]} == {"num_hidden_layers"}
    assert grown["num_hidden_layers"] == 9
    assert base["num_hidden_layers"] == 6
