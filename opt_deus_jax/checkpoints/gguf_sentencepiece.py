"""Builds Gemma's SentencePiece tokenizer from the metadata of a GGUF file."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from opt_deus_jax.checkpoints.gguf_fields import (
    ANOTHER_WAY,
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    required,
    vocabulary_of,
)
from opt_deus_jax.errors import UserError

_SPACE = "\u2581"


def gemma_tokenizer(metadata: Mapping[str, Any], path: pathlib.Path) -> tokenizers.Tokenizer:
    """A tokenizer like the tokenizer.json of Gemma's own release.

    The file has no merges: a token is made of any two that it can be cut into, and the order of
    the vocabulary is that of the merges, as transformers takes it.

    Args:
        metadata: The file's metadata by key.
        path: The file, for messages.

    Returns:
        A tokenizer without its post-processor.

    Raises:
        UserError: The metadata contradicts itself, or has no token of unknown text.
    """
    spelled, types = vocabulary_of(metadata, path)
    if "tokenizer.ggml.unknown_token_id" not in metadata:
        raise UserError(
            f"{path}: the GGUF metadata has no tokenizer.ggml.unknown_token_id; {ANOTHER_WAY}"
        )
    # llama.cpp writes runs of spaces as such; in the text that is tokenised they are these.
    tokens = [_SPACE * len(token) if token and not token.strip(" ") else token for token in spelled]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = tokens[required(metadata, "tokenizer.ggml.unknown_token_id", int, path)]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(tokens, vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    for kinds, is_special in (((UNKNOWN, CONTROL), True), ((USER_DEFINED,), False)):
        added = [
            tokenizers.AddedToken(token, normalized=False, special=is_special)
            for token, kind in zip(spelled, types, strict=True)
            if kind in kinds and token in vocabulary
        ]
        (backend.add_special_tokens if is_special else backend.add_tokens)(added)
    return backend


def _merges(tokens: Sequence[str], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for token in tokens:
        for cut in range(len(token) - 1, 0, -1):
            if token[:cut] in vocabulary and token[cut:] in vocabulary:
                merges.append((token[:cut], token[cut:]))
    return merges
