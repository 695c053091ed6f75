"""Streams text documents from files and installed packages, and turns them into tokens."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from opt_deus_jax.data import docstrings
from opt_deus_jax.data.chunks import Encoded
from opt_deus_jax.data.sources import DOCSTRINGS, ROW_ENDINGS, Source, encodable, read_rows
from opt_deus_jax.errors import UserError

ENDINGS = (".txt", *ROW_ENDINGS)


@dataclasses.dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        id: The `id` of its row, or the file's name and line; splits are made by its hash.
        text: The text, encodable as UTF-8.
    """

    id: str
    text: str

    def __len__(self) -> int:
        return len(self.text)


def read_documents(source: Source, text_field: str) -> Iterator[Document]:
    """Streams the documents of one source; rows without text are left out.

    Args:
        source: A file with one of `ENDINGS`, or the docstrings. A `.txt` file is one document, a
            line of `.jsonl` and a row of `.parquet` are one each.
        text_field: The field of jsonl and parquet rows that holds the text.

    Yields:
        The documents, always in the same order.

    Raises:
        UserError: The file is corrupt, or lacks the text field.
    """
    if source.name == DOCSTRINGS:
        pairs = docstrings.read_docstrings()
    elif source.path.name.lower().endswith(".txt"):
        pairs = _read_txt(source)
    else:
        pairs = (
            (row.id, _text(row.fields[text_field], row.place))
            for row in read_rows(source, text_field)
        )
    for document_id, text in pairs:
        if text.strip():
            yield Document(document_id, encodable(text))


def is_held_out(document_id: str, fraction: float) -> bool:
    """Says whether a document belongs to the held-out split.

    Args:
        document_id: The id of the document.
        fraction: Share of all documents that are held out, 0 to 1.

    Returns:
        The same answer for the same id, on every machine.
    """
    # The prefix keeps the split independent of corpora that are sorted or cut by sha1(id).
    digest = hashlib.sha1(b"held_out:" + document_id.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


class TextEncoder(Protocol):
    """What of a tokenizer is needed to make records of text; it must survive pickling.

    Attributes:
        vocabulary_size: One more than the highest token.
        eos_ids: The tokens that end a text; the first ends a document.
    """

    @property
    def vocabulary_size(self) -> int: ...  # noqa: D102

    @property
    def eos_ids(self) -> tuple[int, ...]: ...  # noqa: D102

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...  # noqa: D102


def encode_documents(tokenizer: TextEncoder, documents: list[Document]) -> Encoded:
    """Turns documents into tokens, each closed by the end-of-sequence token.

    Args:
        tokenizer: The tokenizer.
        documents: The documents.

    Returns:
        Their tokens, none of which belongs to an answer.
    """
    encoded = tokenizer.encode_batch([document.text for document in documents])
    lengths = np.array([len(tokens) + 1 for tokens in encoded], np.int64)
    ended = ((*tokens, tokenizer.eos_ids[0]) for tokens in encoded)
    flat = np.fromiter(itertools.chain.from_iterable(ended), np.uint32, int(lengths.sum()))
    return Encoded(flat, lengths, np.zeros(len(flat), bool))


def _read_txt(source: Source) -> Iterator[tuple[str, str]]:
    try:
        yield source.name, source.path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source.path}: byte {error.start} is not UTF-8: convert the file"
        ) from error
    except OSError as error:
        raise UserError(f"{source.path}: cannot be read ({error.strerror})") from error


def _text(value: Any, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{place}: the text is of type {type(value).__name__}: name a field of text with"
            " --config.data.text_field=NAME"
        )
    return value
