"""Every family grown: loads in transformers, computes what its base does, keeps its pattern."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from opt_deus_jax.checkpoints.hf import open_hf_directory
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.config import UpscaleConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import grown_hf_config, read_model_config
from opt_deus_jax.models.params import identity_values
from opt_deus_jax.upscaling.expand import expand_checkpoint
from opt_deus_jax.upscaling.layout import parents_of, plan_layout
from tests.families import FULL, SLIDING, VARIANTS, load, oracle, write
from tests.llama_checkpoints import oracle_logits, tokens

# Each computes something that no other one does.
EXPANDED = [variant for variant in VARIANTS if " " not in variant and variant != "llama"]


def expand(source, directory, **fields):
    return expand_checkpoint(
        source,
        UpscaleConfig(**fields),
        directory,
        probe_BT=tokens(length=12, vocabulary=64),
        max_shard_bytes=30_000,
    )


@pytest.mark.parametrize("variant", EXPANDED)
def test_a_grown_model_computes_what_its_base_does(tmp_path, variant):
    source, tokens_BT = write(variant, tmp_path / "base"), tokens(length=40, vocabulary=64)
    expected = oracle_logits(oracle(variant), tokens_BT)
    base_types = getattr(oracle(variant).config, "layer_types", None)
    layouts = {
        "top": {"method": "opt_deus", "num_new_layers": 2},
        "uniform": {"method": "llama_pro", "num_new_layers": 2},
    }
    parents = {"top": (0, 1, 2, 2, 3, 3), "uniform": (0, 1, 1, 2, 3, 3)}
    for layout, fields in layouts.items():
        made = expand(source, tmp_path / layout, layout=layout, **fields)
        assert made.identity.bit_identical
        model = load(tmp_path / layout)
        np.testing.assert_allclose(oracle_logits(model, tokens_BT), expected, rtol=0, atol=1e-5)
        grown = open_checkpoint(str(tmp_path / layout))
        base_config, config = (read_model_config(s.hf_config) for s in (source, grown))
        assert config.layer_kinds == tuple(base_config.layer_kinds[p] for p in parents[layout])
        if base_types is not None:
            assert model.config.layer_types == [base_types[p] for p in parents[layout]]
        # A new layer is not zero but where it has to be.
        (new,) = (o for o in made.manifest.layers if o["is_new"] and o["depth"] < 4)
        prefix = f"model.layers.{new['depth']}."
        values = {name: grown.read(name) for name in grown.tensors if name.startswith(prefix)}
        fixed = identity_values(config.of_layer(new["depth"]))
        assert all(np.any(value) for value in values.values()) == (0.0 not in fixed.values())
        constant = [name for name, value in values.items() if len(np.unique(value)) == 1]
        assert len(constant) == len(fixed)


@pytest.mark.parametrize("variant", EXPANDED)
def test_method_base_gives_back_every_byte(tmp_path, variant):
    source = write(variant, tmp_path / "base")
    assert expand(source, tmp_path / "copy", method="base").identity.bit_identical
    stored, copy = (open_hf_directory(tmp_path / name, name) for name in ("base", "copy"))
    assert stored.tensors == copy.tensors
    for name in stored.tensors:
        assert stored.read(name).tobytes() == copy.read(name).tobytes()
    assert stored.hf_config == copy.hf_config


# Grown with parents 0, 1, 2, 2, 3, 3: what each field that counts layers becomes.
GROWN = [
    ("mistral", {}, {}),
    ("qwen2", {"layer_types": None}, {"max_window_layers": 2,
                                      "layer_types": [FULL] * 2 + [SLIDING] * 4}),
    ("qwen2", {"layer_types": None, "max_window_layers": 3, "sliding_window": 7},
     {"max_window_layers": 4, "layer_types": [FULL] * 4 + [SLIDING] * 2}),
    ("qwen2", {"layer_types": None, "max_window_layers": 6},
     {"max_window_layers": 8, "layer_types": [FULL] * 6}),
    ("qwen2", {"layer_types": None, "use_sliding_window": False},
     {"max_window_layers": 2, "layer_types": [FULL] * 6}),
    ("qwen3", {}, {"layer_types": [FULL] * 2 + [SLIDING] * 4,
                   "max_window_layers": 30}),
    ("qwen3_moe", {"mlp_only_layers": [1, 2]}, {"mlp_only_layers": [1, 2, 3],
                                                "decoder_sparse_step": None}),
    ("qwen3_moe", {"mlp_only_layers": [1], "decoder_sparse_step": 2},
     {"mlp_only_layers": [0, 1, 2, 3], "decoder_sparse_step": None}),
    ("smollm3", {"layer_types": None, "no_rope_layers": None, "no_rope_layer_interval": 2},
     {"no_rope_layers": [1, 0, 1, 1, 0, 0], "no_rope_layer_interval": None,
      "layer_types": [FULL, SLIDING, FULL, FULL, SLIDING, SLIDING]}),
    ("gemma2", {"layer_types": None},
     {"layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL, FULL]}),
    ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 3},
     {"layer_types": [SLIDING, SLIDING, FULL, FULL, SLIDING, SLIDING],
      "sliding_window_pattern": None, "_sliding_window_pattern": None}),
    # Four layers of a period of six are all alike, six would not be.
    ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 6},
     {"layer_types": [SLIDING] * 6, "sliding_window_pattern": None,
      "_sliding_window_pattern": None}),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "base", "changed"), GROWN)
def test_every_field_that_counts_layers_is_rewritten(variant, base, changed):
    hf_config = json.loads(oracle(variant).config.to_json_string()) | base
    hf_config = {key: value for key, value in hf_config.items() if value is not None}
    grown = grown_hf_config(hf_config, (0, 1, 2, 2, 3, 3))
    expected = hf_config | {"num_hidden_layers": 6} | changed
    assert grown == {key: value for key, value in expected.items() if value is not None}
    kinds = read_model_config(hf_config).layer_kinds
    assert read_model_config(grown).layer_kinds == tuple(kinds[p] for p in (0, 1, 2, 2, 3, 3))
    assert grown_hf_config(hf_config, range(4)) == hf_config


def test_a_copy_is_of_the_kind_of_its_original_and_others_of_that_above():
    layers = plan_layout("explicit", 4, 0, gaps=(0, 3))
    assert parents_of(layers, prefer_previous=True) == (0, 0, 1, 2, 3, 3)
    assert parents_of(layers, prefer_previous=False) == (0, 1, 1, 2, 3, 3)
    assert parents_of(plan_layout("stack", 4, 2), prefer_previous=False) == (0, 1, 2, 1, 2, 3)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("smollm3", {"no_rope_layers": [1, 0]}, "field no_rope_layers=.* each of the 4 layers"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0 must be a positive"),
        ("qwen2", {"layer_types": [FULL]}, "field layer_types=.* each of the 4 layers"),
        (
            "qwen2",
            {"layer_types": ["chunked_attention"] * 4},
            "layer_types has 'chunked_attention'",
        ),
        ("qwen2", {"use_sliding_window": False}, "use_sliding_window=False: .*give its window"),
        ("gemma2", {"sliding_window": None}, "sliding_window=None with .*give its window"),
        ("gemma2", {"sliding_window": 0}, "field sliding_window=0 must be a positive integer"),
        ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping=-1.0 must be pos"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1.0}}, "rope_parameters=.* for each of"),
        ("granite", {"logits_scaling": 0}, "field logits_scaling=0 must be positive"),
        ("granite", {"residual_multiplier": "1"}, "field residual_multiplier='1' must be a number"),
        ("phi3", {"resid_pdrop": 0.1}, "field resid_pdrop=0.1 is not supported"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope type 'yarn' is not supported; use a checkpoint with one of default",
        ),
        ("mistral", {"layer_types": [FULL] * 4}, "unknown field layer_types="),
        ("mistral", {"hidden_act": "relu"}, "hidden_act='relu' is not supported; .*one of silu"),
    ],
)
def test_what_a_family_does_not_compute_is_refused_by_name(variant, change, message):
    hf_config = json.loads(oracle(variant).config.to_json_string())
    with pytest.raises(UserError, match=message) as caught:
        read_model_config(hf_config | change)
    assert "\n" not in str(caught.value)


def rewritten(directory, change):
    """A Phi-3 with other tensors."""
    source = open_hf_directory(directory, str(directory))
    tensors = {name: source.read(name) for name in source.tensors}
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return open_checkpoint(str(directory))


QKV = "model.layers.1.self_attn.qkv_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(QKV), f"misses tensor {QKV}"),
        (lambda tensors: tensors.update({QKV: tensors[QKV][1:]}), f"tensor {QKV} has shape"),
        (
            lambda tensors: tensors.update({QKV.replace("qkv", "q"): tensors[QKV]}),
            "has unknown tensor model.layers.1.self_attn.q_proj.weight beside",
        ),
        (lambda tensors: tensors.update({"model.bias": tensors[QKV]}), "unknown tensor model.bias"),
    ],
)
def test_tensors_that_do_not_fit_fused_kernels_are_refused(tmp_path, change, message):
    write("phi3", tmp_path / "base")
    with pytest.raises(UserError, match=message):
        rewritten(tmp_path / "base", change)
