"""A tokenizer, templates and instructions so small that tests of them take no time."""

import gzip
import itertools
import json
import pathlib
import random
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from opt_deus_jax.checkpoints.tokenizer import Tokenizer, load_tokenizer
from opt_deus_jax.data.chunks import Encoded
from opt_deus_jax.data.instructions import (
    ENDINGS,
    Conversation,
    Turn,
    read_conversations,
)
from opt_deus_jax.data.sources import find_sources

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_start|>\n\n' + message['content'] | trim }}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_start|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = [
    "Hello",
    " the",
    " cat\n",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "'s",
    " é",
    "東",
    "🎉",
    "12",
    '"',
    ".",
]


def make_tokenizer(backend: tokenizers.Tokenizer, chat_template: str) -> Tokenizer:
    config = {"eos_token": SPECIAL[0], "bos_token": SPECIAL[1], "chat_template": chat_template}
    files = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    return load_tokenizer(files, {"vocab_size": 400}, "tiny")


def train_backend(spaced: bool = False) -> tokenizers.Tokenizer:
    """A small byte-level tokenizer, or one that puts a space before any text as Llama 2 does."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token=None if not spaced else SPECIAL[0]))
    texts = [" ".join(random.Random(i).choices(WORDS, k=30)) for i in range(50)]
    alphabet = []
    if spaced:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*texts, CHATML, ZEPHYR], trainer)
    return backend


def random_conversations(count: int, words: Sequence[str] = WORDS) -> list[Conversation]:
    rng = random.Random(1)
    conversations = []
    for number in range(count):
        roles = ["system"] * (number % 2) + ["user", "assistant"] * rng.randint(1, 3)
        turns = tuple(
            Turn(role, "".join(rng.choices(words, k=rng.randint(1, 8)))) for role in roles
        )
        conversations.append(Conversation(f"row {number}", str(number), turns))
    return conversations


def examples_of(encoded: Encoded) -> list[tuple[list[int], list[bool]]]:
    cuts = itertools.pairwise([0, *np.cumsum(encoded.lengths).tolist()])
    return [(encoded.tokens[a:b].tolist(), encoded.is_answer[a:b].tolist()) for a, b in cuts]


def alpaca_rows(count: int) -> list[dict[str, str]]:
    rows = [
        {
            "instruction": f"Say {i}. " + "a b " * (i % 5),
            "input": "",
            "output": f"{i} it is" * (1 + i % 9),
        }
        for i in range(count)
    ]
    for row in rows[::3]:
        row["input"] = "some text"
    return rows


def write_jsonl(path: pathlib.Path, rows: Sequence[object]) -> pathlib.Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def read(path: pathlib.Path, row_format: str, template: str = "chat") -> list[Conversation]:
    (source,) = find_sources(str(path), ENDINGS)
    return list(read_conversations(source, row_format, template))
