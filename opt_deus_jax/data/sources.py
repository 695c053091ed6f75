"""Files of rows: where they are, what is in them, and whether they are still the same."""

import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet
import zstandard

from opt_deus_jax.data import docstrings
from opt_deus_jax.errors import UserError

DOCSTRINGS = "docstrings:"
ROW_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.xz", ".parquet")
_DECOMPRESSION_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
_READ_BYTES = 1 << 16
_PARQUET_ROWS = 256


class Source(NamedTuple):
    """One file, or the docstrings of the installed packages.

    Attributes:
        path: The file; meaningless for docstrings.
        name: What stands for it wherever the place of the folder must not matter.
    """

    path: Path
    name: str


class Row(NamedTuple):
    """One row of a file.

    Attributes:
        place: File and number, for messages.
        id: The row's own `id`, or the name of the source and the number.
        fields: Its fields.
    """

    place: str
    id: str
    fields: dict[str, Any]


def find_sources(spec: str, endings: Sequence[str]) -> list[Source]:
    """Lists the files that a text names; nothing is read yet.

    Args:
        spec: Files or folders, separated by commas, or `docstrings:`. Folders are searched
            recursively in sorted order, files with other endings in them left out.
        endings: The endings that are wanted, in lower case.

    Returns:
        The files, always in the same order.

    Raises:
        UserError: A path is missing or has another ending, or a folder holds no such file.
    """
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    if not parts:
        raise UserError("no text is named: set --config.data.train=FILES_OR_FOLDERS")
    sources: list[Source] = []
    for part in parts:
        sources += (
            [Source(Path(), DOCSTRINGS)] if part == DOCSTRINGS else _find_files(part, endings)
        )
    return sources


def fingerprint(source: Source) -> str:
    """Hashes all that is in a source.

    Args:
        source: The source.

    Returns:
        Hexadecimal sha256 of the bytes of the file, or of the modules with docstrings.

    Raises:
        UserError: The file cannot be read.
    """
    if source.name == DOCSTRINGS:
        return docstrings.fingerprint()
    try:
        with source.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{source.path}: cannot be read ({error.strerror})") from error


def read_rows(source: Source, field: str | None = None) -> Iterator[Row]:
    """Streams the rows of a file.

    Args:
        source: A file with one of `ROW_ENDINGS`, or a `.json` file that holds a list of objects.
        field: A field that every row must have; parquet then reads only it and `id`. None reads
            all and demands none.

    Yields:
        The rows in order.

    Raises:
        UserError: The file is corrupt, a row is no object, or it lacks the field.
    """
    name = source.path.name.lower()
    if name.endswith(".parquet"):
        yield from _read_parquet(source, field)
        return
    for number, place, fields in (_read_json if name.endswith(".json") else _read_jsonl)(source):
        if not isinstance(fields, dict):
            raise UserError(f"{place}: holds no JSON object: one object with text a line or row")
        if field is not None and field not in fields:
            raise _missing_field(place, field, fields)
        yield Row(place, _row_id(fields.get("id"), f"{source.name}:{number}"), fields)


def encodable(text: str) -> str:
    """Replaces lone surrogates, which JSON can carry and tokenizers refuse.

    Args:
        text: Any text.

    Returns:
        The same text where it can be written as UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _find_files(part: str, endings: Sequence[str]) -> list[Source]:
    def is_wanted(file: Path) -> bool:
        return file.name.lower().endswith(tuple(endings))

    wanted = f"{', '.join(endings[:-1])} or {endings[-1]}"
    path = Path(part).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if is_wanted(p) and p.is_file())
        if not found:
            raise UserError(f"{path}: no text files in this folder: put {wanted} into it")
        return [Source(p, p.relative_to(path).as_posix()) for p in found]
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder: mend the path in --config.data.train or .held_out"
        )
    if not is_wanted(path):
        raise UserError(f"{path}: unknown kind of file: use {wanted}")
    return [Source(path, path.name)]


def _read_json(source: Source) -> Iterator[tuple[int, str, Any]]:
    try:
        rows = json.loads(source.path.read_bytes())
    except OSError as error:
        raise UserError(f"{source.path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(
            f"{source.path}: not JSON ({error}): mend it; a file with one object a line must end"
            " in .jsonl"
        ) from error
    if not isinstance(rows, list):
        raise UserError(f"{source.path}: holds no JSON list: use a list of objects")
    for number, row in enumerate(rows, start=1):
        yield number, f"{source.path}: row {number}", row


def _read_jsonl(source: Source) -> Iterator[tuple[int, str, Any]]:
    for number, line in enumerate(_read_lines(source.path), start=1):
        if not line.strip():
            continue
        place = f"{source.path}:{number}"
        try:
            yield number, place, json.loads(line)
        except ValueError as error:
            raise UserError(f"{place}: not a line of JSON ({error}): mend or drop it") from error


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


def _read_parquet(source: Source, field: str | None) -> Iterator[Row]:
    path = source.path
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field is not None:
                if field not in columns:
                    raise _missing_field(str(path), field, columns)
                columns = [name for name in columns if name in (field, "id")]
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for fields in batch.to_pylist():
                    number += 1
                    identity = _row_id(fields.get("id"), f"{source.name}:{number}")
                    yield Row(f"{path}: row {number}", identity, fields)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: cannot be read or is corrupt ({reason}): fetch it anew"
        ) from error


def _row_id(identity: Any, place: str) -> str:
    return identity if isinstance(identity, str) and identity else place


def _missing_field(place: str, field: str, fields: Iterable[str]) -> UserError:
    return UserError(
        f"{place}: no field {field!r}, only {', '.join(map(repr, fields)) or 'none'}: name"
        " the one with the text by --config.data.text_field=NAME"
    )
