"""Values of a GGUF file's metadata, checked as they are taken."""

import pathlib
from collections.abc import Mapping
from typing import Any

from opt_deus_jax.errors import UserError

# llama.cpp's token types. It matches all but normal tokens whole in the text.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
ANOTHER_WAY = "use the model's Hugging Face directory (config.json, safetensors) instead"


def required(metadata: Mapping[str, Any], key: str, kind: type, path: pathlib.Path) -> Any:
    """Takes one metadata value that the file must have.

    Raises:
        UserError: The key is absent or its value is not of that kind.
    """
    if key not in metadata:
        raise UserError(
            f"{path}: the GGUF metadata has no {key}; download a complete file, or convert the "
            "model again with a current llama.cpp"
        )
    value = metadata[key]
    # bool is a subclass of int.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(
            f"{path}: GGUF metadata {key} is {_shortened(value)}, not one {kind.__name__}; "
            f"{ANOTHER_WAY}"
        )
    return value


def vocabulary_of(metadata: Mapping[str, Any], path: pathlib.Path) -> tuple[list[str], list[int]]:
    """The tokens and their types.

    Raises:
        UserError: Their numbers differ, or a token is there twice.
    """
    tokens = required(metadata, "tokenizer.ggml.tokens", list, path)
    types = required(metadata, "tokenizer.ggml.token_type", list, path)
    distinct = len(set(tokens))
    if distinct != len(tokens) or len(types) != len(tokens):
        raise UserError(
            f"{path}: {len(tokens)} tokens in the GGUF metadata, {distinct} of them "
            f"distinct, with {len(types)} token types: the numbers must agree; download the file "
            "again"
        )
    return tokens, types


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
