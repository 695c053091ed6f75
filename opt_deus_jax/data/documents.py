"""Streams text documents from files, folders and installed packages, and their tokens."""

import collections
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import lzma
import multiprocessing
import os
import zlib
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import zstandard

from opt_deus_jax.data import docstrings
from opt_deus_jax.errors import UserError

DOCSTRINGS = "docstrings:"
ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.xz", ".parquet")
_DECOMPRESSION_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
_READ_BYTES = 1 << 16
_PARQUET_ROWS = 256
_CHUNK_CHARACTERS = 1 << 18
# Starting processes takes seconds: this much text is first tokenised without them.
_MIN_PARALLEL_CHARACTERS = 1 << 23


@dataclasses.dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        id: The `id` of its row, or the file's name and line; splits are made by its hash.
        text: The text, encodable as UTF-8.
    """

    id: str
    text: str


def read_documents(spec: str, text_field: str) -> Iterator[Document]:
    """Streams the documents of a list of sources; rows without text are left out.

    Args:
        spec: Files or folders, separated by commas, or `docstrings:`. A `.txt` file is one
            document, a line of `.jsonl` and a row of `.parquet` are one each; folders are read
            recursively in sorted order, files with other endings in them left out.
        text_field: The field of jsonl and parquet rows that holds the text.

    Yields:
        The documents, always in the same order.

    Raises:
        UserError: A path is missing, has an unknown ending, is corrupt, or lacks the text field.
    """
    sources = [part.strip() for part in spec.split(",") if part.strip()]
    if not sources:
        raise UserError("no text is named: set --config.data.train=FILES_OR_FOLDERS")
    files: list[tuple[Path, str]] = []
    # All paths are looked up first: a typing error in the last should not cost an hour.
    for source in sources:
        files += [(Path(), DOCSTRINGS)] if source == DOCSTRINGS else _find_files(source)
    for path, name in files:
        if name == DOCSTRINGS:
            pairs = docstrings.read_docstrings()
        else:
            pairs = _read_file(path, name, text_field)
        for document_id, text in pairs:
            if text.strip():
                yield Document(document_id, _encodable(text))


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
    """What of a tokenizer is needed to make records; it must survive pickling.

    Attributes:
        vocabulary_size: One more than the highest token.
        eos_id: The token that ends a document.
    """

    @property
    def vocabulary_size(self) -> int: ...  # noqa: D102

    @property
    def eos_id(self) -> int: ...  # noqa: D102

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...  # noqa: D102


def tokenize(
    labelled: Iterable[tuple[str, Document]], tokenizer: TextEncoder, num_workers: int
) -> Generator[tuple[str, np.ndarray, np.ndarray], None, None]:
    """Turns documents into tokens, in several processes where there is enough text.

    Args:
        labelled: Documents, each with a label (the name of its split). Read ahead by a few chunks.
        tokenizer: The tokenizer.
        num_workers: Processes that tokenise; 0 means one a core.

    Yields:
        A label, the tokens [total] of some documents of it, each closed by the end-of-sequence
        token, uint32, and their lengths [documents], int64. The order of the documents of a label
        is kept, whatever the number of processes.

    Raises:
        UserError: A process died.
    """
    num_workers = num_workers or os.cpu_count() or 1
    chunks = _chunks(labelled)
    characters = 0
    for label, texts in chunks:
        yield label, *_encode(tokenizer, texts)
        characters += sum(map(len, texts))
        if num_workers > 1 and characters >= _MIN_PARALLEL_CHARACTERS:
            yield from _tokenize_in_processes(chunks, tokenizer, num_workers)


def _tokenize_in_processes(
    chunks: Iterator[tuple[str, list[str]]], tokenizer: TextEncoder, num_workers: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    # The parent has threads of JAX, with which forking can deadlock.
    executor = ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer,),
    )
    pending: collections.deque[tuple[str, Future]] = collections.deque()
    try:
        # A bounded queue instead of `map`, which would first read the whole corpus.
        for label, texts in itertools.islice(chunks, 2 * num_workers):
            pending.append((label, executor.submit(_encode_in_worker, texts)))
        while pending:
            label, future = pending.popleft()
            yield label, *future.result()
            for next_label, texts in itertools.islice(chunks, 1):
                pending.append((next_label, executor.submit(_encode_in_worker, texts)))
    except BrokenProcessPool as error:
        raise UserError(
            "tokenising: a worker process died, perhaps for want of memory: use fewer by"
            " --config.data.num_workers=1"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _chunks(labelled: Iterable[tuple[str, Document]]) -> Iterator[tuple[str, list[str]]]:
    texts: dict[str, list[str]] = collections.defaultdict(list)
    characters: dict[str, int] = collections.defaultdict(int)
    for label, document in labelled:
        texts[label].append(document.text)
        characters[label] += len(document.text)
        if characters[label] >= _CHUNK_CHARACTERS:
            yield label, texts.pop(label)
            characters[label] = 0
    yield from texts.items()


def _encode(tokenizer: TextEncoder, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    encoded = tokenizer.encode_batch(texts)
    lengths = np.array([len(tokens) + 1 for tokens in encoded], np.int64)
    ended = ((*tokens, tokenizer.eos_id) for tokens in encoded)
    flat = np.fromiter(itertools.chain.from_iterable(ended), np.uint32, int(lengths.sum()))
    return flat, lengths


_worker_tokenizer: TextEncoder | None = None


def _start_worker(tokenizer: TextEncoder) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    # One process a core is enough; threads of the tokenizer in each would fight for them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _encode_in_worker(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    assert _worker_tokenizer is not None
    return _encode(_worker_tokenizer, texts)


def _find_files(source: str) -> list[tuple[Path, str]]:
    """Lists the files of one source, each with the name that stands for it in document ids."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if _is_text(p) and p.is_file())
        if not found:
            raise UserError(f"{path}: no text files in this folder: put {_endings()} into it")
        return [(p, p.relative_to(path).as_posix()) for p in found]
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder: mend the path in --config.data.train or .held_out"
        )
    if not _is_text(path):
        raise UserError(f"{path}: unknown kind of file: use {_endings()}")
    return [(path, path.name)]


def _is_text(path: Path) -> bool:
    return path.name.lower().endswith(ENDINGS)


def _endings() -> str:
    return f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"


def _encodable(text: str) -> str:
    """Replaces lone surrogates, which JSON can carry and tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _read_file(path: Path, name: str, text_field: str) -> Iterator[tuple[str, str]]:
    if path.name.lower().endswith(".parquet"):
        return _read_parquet(path, name, text_field)
    if path.name.lower().endswith(".txt"):
        return _read_txt(path, name)
    return _read_jsonl(path, name, text_field)


def _read_txt(path: Path, name: str) -> Iterator[tuple[str, str]]:
    try:
        yield name, path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8: convert the file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _read_jsonl(path: Path, name: str, text_field: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place}: not a line of JSON ({error}): mend or drop it") from error
        if not isinstance(row, dict):
            raise UserError(f"{place}: holds no JSON object: one object with text a line")
        if text_field not in row:
            raise _missing_field(place, text_field, row)
        yield _document_id(row.get("id"), f"{name}:{number}"), _text(row[text_field], place)


def _read_lines(path: Path) -> Iterator[bytes]:
    ending = path.suffix.lower()
    try:
        with path.open("rb") as raw:
            if ending == ".gz":
                with gzip.open(raw) as unpacked:
                    yield from unpacked
            elif ending == ".xz":
                with lzma.open(raw) as unpacked:
                    yield from unpacked
            elif ending == ".zst":
                yield from io.BufferedReader(_ZstdFile(raw))
            else:
                yield from raw
    except _DECOMPRESSION_ERRORS as error:
        raise UserError(f"{path}: cannot be read or is corrupt ({error}): fetch it anew") from error


class _ZstdFile(io.RawIOBase):
    """Zstandard frames as one file; the library's own reader takes a cut file for a whole one."""

    def __init__(self, raw: BinaryIO):
        self._raw = raw
        # Public corpora are often packed with `zstd --long=31`.
        self._library = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame = self._library.decompressobj()
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            block = (self._frame.unused_data if self._frame.eof else b"") or self._raw.read(
                _READ_BYTES
            )
            if not block:
                if not self._frame.eof:
                    raise EOFError("the last frame is cut short")
                return 0
            if self._frame.eof:
                self._frame = self._library.decompressobj()
            self._pending = self._frame.decompress(block)
        taken = self._pending[: len(buffer)]
        self._pending = self._pending[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)


def _read_parquet(path: Path, name: str, text_field: str) -> Iterator[tuple[str, str]]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            fields = file.schema_arrow.names
            if text_field not in fields:
                raise _missing_field(str(path), text_field, fields)
            columns = [text_field] + ["id"] * ("id" in fields and text_field != "id")
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    identity = _document_id(row.get("id"), f"{name}:{number}")
                    yield identity, _text(row[text_field], f"{path}: row {number}")
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: cannot be read or is corrupt ({reason}): fetch it anew"
        ) from error


def _document_id(identity: Any, place: str) -> str:
    return identity if isinstance(identity, str) and identity else place


def _text(value: Any, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{place}: the text is of type {type(value).__name__}: name a field of text with"
            " --config.data.text_field=NAME"
        )
    return value


def _missing_field(place: str, text_field: str, fields: Iterable[str]) -> UserError:
    return UserError(
        f"{place}: no field {text_field!r}, only {', '.join(map(repr, fields)) or 'none'}: name"
        " the one with the text by --config.data.text_field=NAME"
    )
