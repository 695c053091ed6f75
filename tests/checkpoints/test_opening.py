import json

import numpy as np
import pytest
from huggingface_hub import constants

from opt_deus_jax.checkpoints.opening import open_checkpoint, read_config_only
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import read_model_config
from tests.llama_checkpoints import LLAMA3_ROPE, hf_config, random_tensors, write_directory

CONFIG = hf_config(num_hidden_layers=2)
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path):
    return write_directory(tmp_path / "base", CONFIG, random_tensors(CONFIG))


def test_a_folder_is_opened_under_the_name_it_was_given(base, monkeypatch):
    monkeypatch.chdir(base.parent)
    source = open_checkpoint("base")
    assert source.name == "base"
    assert source.hf_config == CONFIG
    np.testing.assert_array_equal(source.read(UP), random_tensors(CONFIG)[UP])


def test_buffers_of_old_checkpoints_are_left_out(tmp_path):
    tensors = random_tensors(CONFIG)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    write_directory(tmp_path / "base", CONFIG, tensors | buffer)
    assert open_checkpoint(str(tmp_path / "base")).tensors.keys() == tensors.keys()


def test_an_equal_copy_of_a_tied_head_is_dropped_and_another_head_refused(tmp_path):
    tensors = random_tensors(CONFIG)
    copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    write_directory(tmp_path / "copy", CONFIG, tensors | copy)
    assert open_checkpoint(str(tmp_path / "copy")).tensors.keys() == tensors.keys()
    copy["lm_head.weight"][0, 0] += 1
    write_directory(tmp_path / "other", CONFIG, tensors | copy)
    with pytest.raises(UserError, match="lm_head.weight differs .* tie_word_embeddings"):
        open_checkpoint(str(tmp_path / "other"))


def changed_tensors(change):
    tensors = random_tensors(CONFIG)
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({}, lambda t: t.pop(UP), rf"misses tensor {UP} \(and 0 more\).*fetch it again"),
        ({"num_hidden_layers": 3}, None, r"misses tensor model.layers.2.* \(and 8 more\)"),
        ({"num_hidden_layers": 1}, None, r"has unknown tensor model.layers.1.* \(and 8 more\)"),
        ({"tie_word_embeddings": False}, None, "misses tensor lm_head.weight"),
        ({"attention_bias": True}, None, "misses tensor model.layers.0.self_attn.q_proj.bias"),
        ({}, lambda t: t.update(x=np.ones(1, np.float32)), "has unknown tensor x"),
        (
            {"intermediate_size": 40},
            None,
            r"gate_proj.weight has shape \(48, 32\), config.json asks for \(40, 32\); one of",
        ),
        ({"model_type": "mamba"}, None, "config.json: architecture model_type='mamba'"),
        (
            {"rope_scaling": LLAMA3_ROPE | {"rope_type": "longrope"}},
            None,
            "config.json: rope type 'longrope' is not supported",
        ),
        ({"hidden_act": "gelu"}, None, "config.json: field hidden_act='gelu'"),
    ],
)
def test_tensors_and_config_must_fit(tmp_path, config, change, message):
    tensors = changed_tensors(change or (lambda t: None))
    path = write_directory(tmp_path / "base", CONFIG | config, tensors)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(str(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_no_base_is_refused():
    with pytest.raises(UserError, match="field base is empty; set --config.base="):
        open_checkpoint("")


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="field base=.*not .gguf; give its folder"):
        open_checkpoint(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["no-such-org/no-such-model", "a/b/c/d", "nowhere"])
def test_a_hub_id_that_cannot_be_fetched_is_refused_in_one_line(name):
    assert constants.HF_HUB_OFFLINE
    with pytest.raises(UserError, match=f"field base='{name}': no such folder .* local") as caught:
        open_checkpoint(name)
    assert "\n" not in str(caught.value)


def test_a_config_alone_is_enough_to_plan(base):
    content = json.dumps(CONFIG | {"num_hidden_layers": 70})
    path = base.parent / "config.json"
    path.write_text(content)
    for given in (path, base.parent):
        hf_config_read, config = read_config_only(str(given))
        assert hf_config_read == json.loads(content)
        assert config == read_model_config(json.loads(content))
    # With weights beside it, they must fit.
    assert read_config_only(str(base))[1].num_layers == 2


@pytest.mark.parametrize("content", [None, b"{", b"[1]", b"\xff\xfe\x00"])
def test_a_config_that_cannot_be_read_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="config.json'?[:=]") as caught:
        read_config_only(str(tmp_path / "config.json"))
    assert "\n" not in str(caught.value)
