"""Builds Hugging Face tokenizer files from the metadata of a GGUF file."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from opt_deus_jax.checkpoints.gguf_fields import (
    ANOTHER_WAY,
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    required,
    vocabulary_of,
)
from opt_deus_jax.checkpoints.gguf_sentencepiece import gemma_tokenizer
from opt_deus_jax.errors import UserError

_CONTRACTIONS_AND_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True)
class _BytePairRules:
    """What surrounds the merges of a byte-level vocabulary and is in no GGUF field.

    Attributes:
        split: Pattern that isolates words; None for GPT-2's, which is part of ByteLevel.
        individual_digits: Whether digits are split off one by one before anything else.
        nfc: Whether text is composed (Unicode NFC) first.
        ignore_merges: Whether a word of the vocabulary is taken whole, reachable by merges or not.
        adds_bos: Whether encoding begins with bos where the file does not say.
    """

    split: str | None = None
    individual_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_LLAMA3 = _BytePairRules(
    split=rf"{_CONTRACTIONS_AND_WORDS}|\p{{N}}{{1,3}}|{_PUNCTUATION_AND_SPACE}",
    ignore_merges=True,
    adds_bos=True,
)
# By `tokenizer.ggml.pre`, after the tokenizer.json of each family's own release.
_RULES = {
    "gpt-2": _BytePairRules(),
    "smollm": _BytePairRules(individual_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _BytePairRules(
        split=rf"{_CONTRACTIONS_AND_WORDS}|\p{{N}}|{_PUNCTUATION_AND_SPACE}", nfc=True
    ),
}
_SPECIAL_TOKEN_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def special_token_ids(metadata: Mapping[str, Any], path: pathlib.Path) -> dict[str, int | None]:
    """Ids of the bos, eos, unk and pad tokens, None for those that the file does not name.

    Raises:
        UserError: An id is not an integer inside the vocabulary.
    """
    tokens = required(metadata, "tokenizer.ggml.tokens", list, path)
    ids: dict[str, int | None] = {}
    for token, suffix in _SPECIAL_TOKEN_KEYS.items():
        key = f"tokenizer.ggml.{suffix}"
        ids[token] = required(metadata, key, int, path) if key in metadata else None
        if ids[token] is not None and not 0 <= metadata[key] < len(tokens):
            raise UserError(
                f"{path}: GGUF metadata {key} is {metadata[key]}, outside the vocabulary of "
                f"{len(tokens)} tokens; download the file again"
            )
    return ids


def tokenizer_side_files(metadata: Mapping[str, Any], path: pathlib.Path) -> dict[str, bytes]:
    """Writes the tokenizer and generation files that a Hugging Face directory would have.

    Args:
        metadata: The file's metadata by key.
        path: The file, for messages.

    Returns:
        tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json.

    Raises:
        UserError: The tokenizer is of a kind that is not supported, or its metadata is broken.
    """
    architecture = required(metadata, "general.architecture", str, path)
    # What surrounds the vocabulary is a matter of the architecture, and of no field.
    is_gemma = architecture.startswith("gemma")
    rules = _BytePairRules(adds_bos=True) if is_gemma else _rules(metadata, path)
    tokens = required(metadata, "tokenizer.ggml.tokens", list, path)
    ids = special_token_ids(metadata, path)
    special_tokens = {token: tokens[index] for token, index in ids.items() if index is not None}
    adds = {
        "bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", rules.adds_bos)),
        "eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
    }
    for token, added in adds.items():
        if added and ids[token] is None:
            raise UserError(
                f"{path}: the tokenizer adds a {token}, but the GGUF metadata has no "
                f"tokenizer.ggml.{_SPECIAL_TOKEN_KEYS[token]}; {ANOTHER_WAY}"
            )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds["bos_token"],
        "add_eos_token": adds["eos_token"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": required(metadata, f"{architecture}.context_length", int, path),
        **special_tokens,
    }
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = required(metadata, "tokenizer.chat_template", str, path)
    generation = {
        f"{name}_token_id": ids[f"{name}_token"]
        for name in ("bos", "eos", "pad")
        if ids[f"{name}_token"] is not None
    }
    if is_gemma:
        backend = gemma_tokenizer(metadata, path)
    else:
        backend = _byte_pair_tokenizer(metadata, rules, path)
    bos, eos = (ids[token] if added else None for token, added in adds.items())
    backend.post_processor = _post_processor(tokens, bos, eos)
    return {
        "tokenizer.json": backend.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json_bytes(config),
        "special_tokens_map.json": _json_bytes(special_tokens),
        "generation_config.json": _json_bytes(generation),
    }


def _rules(metadata: Mapping[str, Any], path: pathlib.Path) -> _BytePairRules:
    model = required(metadata, "tokenizer.ggml.model", str, path)
    if model != "gpt2":
        kind = "SentencePiece, " if model == "llama" else ""
        raise UserError(
            f"{path}: the tokenizer is of the kind {model!r} ({kind}tokenizer.ggml.model); only "
            f"'gpt2' (byte-level BPE) is read from GGUF: {ANOTHER_WAY}"
        )
    pre_tokenizer = required(metadata, "tokenizer.ggml.pre", str, path)
    if pre_tokenizer not in _RULES:
        raise UserError(
            f"{path}: the pre-tokenizer {pre_tokenizer!r} (tokenizer.ggml.pre) is not one of "
            f"{', '.join(sorted(_RULES))}; {ANOTHER_WAY}"
        )
    return _RULES[pre_tokenizer]


def _byte_pair_tokenizer(
    metadata: Mapping[str, Any], rules: _BytePairRules, path: pathlib.Path
) -> tokenizers.Tokenizer:
    tokens, types = vocabulary_of(metadata, path)
    merges = [
        tuple(merge.split(" ")) for merge in required(metadata, "tokenizer.ggml.merges", list, path)
    ]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise UserError(
                f"{path}: tokenizer.ggml.merges has {' '.join(pair)!r}, which does not join two "
                "tokens of the vocabulary into a third; download the file again"
            )
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rules.ignore_merges)
    )
    if rules.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(rules)
    backend.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        added = tokenizers.AddedToken(token, normalized=False, special=kind != USER_DEFINED)
        if kind in (UNKNOWN, CONTROL):
            backend.add_special_tokens([added])
        elif kind == USER_DEFINED:
            backend.add_tokens([added])
    return backend


def _pre_tokenizer(rules: _BytePairRules) -> pre_tokenizers.PreTokenizer:
    steps: list[pre_tokenizers.PreTokenizer] = []
    if rules.individual_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if rules.split is not None:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(rules.split), behavior="isolated"))
    steps.append(
        pre_tokenizers.ByteLevel(
            add_prefix_space=False, trim_offsets=True, use_regex=rules.split is None
        )
    )
    return pre_tokenizers.Sequence(steps)  # pyright: ignore[reportArgumentType]


def _post_processor(
    tokens: list[str], bos: int | None, eos: int | None
) -> processors.PostProcessor | None:
    """Adds bos and eos as transformers' fast tokenizers do; None where neither is added."""
    around = {index: f"<special{index}>" for index in (bos, eos) if index is not None}
    if not around:
        return None
    before = [] if bos is None else [around[bos]]
    after = [] if eos is None else [around[eos]]
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1"]
        + [f"{token}:1" for token in after],
        special_tokens=[
            {"id": name, "ids": [index], "tokens": [tokens[index]]}
            for index, name in around.items()
        ],
    )


def _json_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
