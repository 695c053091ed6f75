"""Fixed-length token records on disk: made once from text, then read at random."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from opt_deus_jax.config import DataConfig
from opt_deus_jax.data.documents import (
    Document,
    TextEncoder,
    is_held_out,
    read_documents,
    tokenize,
)
from opt_deus_jax.errors import UserError

FORMAT_VERSION = 1
SPLITS = ("train", "held_out")
_INFO_FILE = "records.json"


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """What one split holds.

    Attributes:
        documents: Documents of which at least one token was kept.
        records: Records of sequence_length + 1 tokens, each sharing one token with the next.
        tokens: Tokens that are predicted once an epoch: records * sequence_length. The file
            holds one more.
        sha256: Hexadecimal hash of the file.
    """

    documents: int
    records: int
    tokens: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class RecordsInfo:
    """The content of `records.json`.

    Attributes:
        settings: Everything that the records follow from, by name; see `record_settings`.
        dtype: Type of the tokens on disk, uint16 or uint32, little endian.
        splits: What each of `SPLITS` holds.
    """

    settings: dict[str, Any]
    dtype: str
    splits: dict[str, SplitInfo]


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of one split, memory-mapped: record r is tokens[r * L : r * L + L + 1].

    Attributes:
        tokens: All tokens of the split [records * sequence_length + 1], uint16 or uint32.
        sequence_length: L, the tokens that a record predicts.
    """

    tokens: np.ndarray
    sequence_length: int

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.sequence_length

    def __getitem__(self, index: int) -> np.ndarray:
        """Reads one record.

        Args:
            index: Its number, 0 to len - 1.

        Returns:
            Its tokens [sequence_length + 1], int32.

        Raises:
            IndexError: There is no such record.
        """
        return self.rows([index])["tokens"][0]

    def rows(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """Reads several records.

        Args:
            numbers: Their numbers, 0 to len - 1, in any order.

        Returns:
            {"tokens": [numbers, sequence_length + 1] int32}.

        Raises:
            IndexError: There is no such record.
        """
        chosen = np.asarray(numbers, np.int64)
        if np.any((chosen < 0) | (chosen >= len(self))):
            raise IndexError(f"records {chosen.tolist()} of {len(self)}")
        places = chosen[:, None] * self.sequence_length + np.arange(self.sequence_length + 1)
        return {"tokens": self.tokens[places].astype(np.int32)}


def record_settings(
    data: DataConfig, tokenizer: TextEncoder, tokenizer_fingerprint: str, vocabulary_size: int
) -> dict[str, Any]:
    """Collects what records follow from, and nothing that leaves them unchanged.

    Args:
        data: The data settings.
        tokenizer: The tokenizer.
        tokenizer_fingerprint: Any string that changes when the tokenizer does.
        vocabulary_size: Rows of the model's embedding.

    Returns:
        Values that JSON keeps, by the names of `DataConfig` where they come from there.
    """
    settings = dataclasses.asdict(data)
    for name in ("num_workers", "seed") + ("held_out_fraction",) * bool(data.held_out):
        del settings[name]
    return settings | {
        "vocabulary_size": vocabulary_size,
        "eos_id": tokenizer.eos_id,
        "tokenizer_sha256": hashlib.sha256(tokenizer_fingerprint.encode()).hexdigest(),
        "format_version": FORMAT_VERSION,
    }


def prepare_records(
    directory: str | os.PathLike[str],
    data: DataConfig,
    tokenizer: TextEncoder,
    *,
    tokenizer_fingerprint: str,
    vocabulary_size: int | None = None,
) -> RecordsInfo:
    """Makes the records of both splits, or finds them made.

    Each document is followed by the end-of-sequence token, all are joined in order, and the
    incomplete last record is dropped. The files are the same for any number of workers.

    Args:
        directory: Where `train.bin`, `held_out.bin` and, last, `records.json` are written.
        data: The data settings.
        tokenizer: The tokenizer; it must survive pickling.
        tokenizer_fingerprint: Any string that changes when the tokenizer does.
        vocabulary_size: Rows of the model's embedding; the tokenizer's own where None.

    Returns:
        What is in the folder.

    Raises:
        UserError: A setting or the text is unusable, the folder holds records of other settings,
            a split has no whole record, a token lies outside the vocabulary, the disk is full.
    """
    _check_config(data)
    directory = Path(directory)
    size = tokenizer.vocabulary_size if vocabulary_size is None else vocabulary_size
    settings = record_settings(data, tokenizer, tokenizer_fingerprint, size)
    if (directory / _INFO_FILE).exists():
        info = load_info(directory)
        _check_same(directory, info.settings, settings)
        for split in SPLITS:
            load_records(directory, split)
        return info
    dtype = "uint16" if size <= 1 << 16 else "uint32"
    budgets = {"train": data.max_train_tokens, "held_out": data.max_held_out_tokens}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            writers = {
                split: stack.enter_context(
                    _SplitWriter(directory / f"{split}.bin", budget, dtype, data.sequence_length)
                )
                for split, budget in budgets.items()
            }
            _fill(writers, data, tokenizer, size)
            splits = {split: writer.finish(split) for split, writer in writers.items()}
            for writer in writers.values():
                writer.publish()
        info = RecordsInfo(settings, dtype, splits)
        _write_info(directory, info)
    except OSError as error:
        raise _disk_error(directory, budgets, dtype, error) from error
    return info


def load_info(directory: str | os.PathLike[str]) -> RecordsInfo:
    """Reads `records.json`.

    Args:
        directory: The folder of `prepare_records`.

    Returns:
        Its content.

    Raises:
        UserError: The file is missing or unreadable.
    """
    path = Path(directory) / _INFO_FILE
    if not path.exists():
        raise UserError(f"{path}: no records here: run experiments.prepare_data first")
    try:
        content = json.loads(path.read_bytes())
        splits = {name: SplitInfo(**split) for name, split in content.pop("splits").items()}
        return RecordsInfo(splits=splits, **content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a list of records: delete {path.parent}") from error


def load_records(directory: str | os.PathLike[str], split: str, *, verify: bool = False) -> Records:
    """Opens the records of one split.

    Args:
        directory: The folder of `prepare_records`.
        split: `train` or `held_out`.
        verify: Whether to check the hash of the whole file, not only its size.

    Returns:
        The records, memory-mapped.

    Raises:
        UserError: The file is missing, or differs from what `records.json` says.
    """
    info = load_info(directory)
    path = Path(directory) / f"{split}.bin"
    remedy = f"delete {path.parent} and run experiments.prepare_data"
    if split not in info.splits or not path.exists():
        raise UserError(f"{path}: no such records: {remedy}")
    expected = info.splits[split]
    dtype = np.dtype(info.dtype).newbyteorder("<")
    size, expected_size = path.stat().st_size, (expected.tokens + 1) * dtype.itemsize
    if size != expected_size:
        raise UserError(f"{path}: {size} bytes where {expected_size} were written: {remedy}")
    if verify and _sha256(path) != expected.sha256:
        raise UserError(f"{path}: its sha256 is not that of {_INFO_FILE}: {remedy}")
    return Records(np.memmap(path, dtype, "r"), info.settings["sequence_length"])


class _SplitWriter:
    """Appends the tokens of one split to a file that gets its name when it is whole."""

    def __init__(self, path: Path, budget: int, dtype: str, sequence_length: int):
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        # One token more than are predicted: the first one has nothing before it.
        self._limit = budget + 1 if budget else None
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._sequence_length = sequence_length
        self._written = 0
        self._documents = 0

    def __enter__(self) -> "_SplitWriter":
        self._file = self._temporary.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        # Closing flushes: on a full disk it fails too, and would hide the first error.
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    @property
    def is_full(self) -> bool:
        return self._limit is not None and self._written >= self._limit

    def append(self, tokens: np.ndarray, lengths: np.ndarray) -> int:
        """Appends documents of `lengths` tokens, up to the limit; returns the tokens taken."""
        room = len(tokens) if self._limit is None else self._limit - self._written
        kept = tokens[:room]
        self._file.write(kept.astype(self._dtype).tobytes())
        starts = np.cumsum(lengths) - lengths
        self._documents += int(np.sum(starts < len(kept)))
        self._written += len(kept)
        return len(kept)

    def finish(self, split: str) -> SplitInfo:
        """Drops the incomplete record at the end and makes the file durable."""
        records = max(0, self._written - 1) // self._sequence_length
        if not records:
            more = " (or raise data.held_out_fraction)" if split == "held_out" else ""
            raise UserError(
                f"config field data.{split}: {self._documents} documents with {self._written}"
                f" tokens, one record needs {self._sequence_length + 1}; give more text{more}, or"
                " lower data.sequence_length"
            )
        tokens = records * self._sequence_length
        self._file.truncate((tokens + 1) * self._dtype.itemsize)
        self._file.flush()
        os.fsync(self._file.fileno())
        return SplitInfo(self._documents, records, tokens, _sha256(self._temporary))

    def publish(self) -> None:
        self._temporary.replace(self._path)


def _fill(
    writers: dict[str, _SplitWriter], data: DataConfig, tokenizer: TextEncoder, size: int
) -> None:
    budgets = (data.max_train_tokens, data.max_held_out_tokens)
    with (
        tqdm(
            desc="tokens",
            total=sum(budgets) if all(budgets) else None,
            unit="",
            unit_scale=True,
            disable=None,
        ) as progress,
        contextlib.closing(
            tokenize(_labelled(writers, data), tokenizer, data.num_workers)
        ) as batches,
    ):
        for split, tokens, lengths in batches:
            highest = int(tokens.max(initial=0))
            if highest >= size:
                raise UserError(
                    f"tokenizer: gives token {highest}, but the vocabulary has {size}: use the"
                    " tokenizer that belongs to this model"
                )
            progress.update(writers[split].append(tokens, lengths))
            if all(writer.is_full for writer in writers.values()):
                break


def _labelled(writers: dict[str, _SplitWriter], data: DataConfig) -> Iterator[tuple[str, Document]]:
    """Yields each document with its split, leaving off where the splits have enough."""
    apart = [(data.train, SPLITS[:1]), (data.held_out, SPLITS[1:])]
    sources = apart if data.held_out else [(data.train, SPLITS)]
    for spec, splits in sources:
        if all(writers[split].is_full for split in splits):
            continue
        for document in read_documents(spec, data.text_field):
            split = splits[0]
            if len(splits) > 1:
                split = splits[is_held_out(document.id, data.held_out_fraction)]
            if not writers[split].is_full:
                yield split, document
            if all(writers[split].is_full for split in splits):
                break


def _check_config(data: DataConfig) -> None:
    if data.sequence_length < 1:
        raise UserError(f"config field data.sequence_length={data.sequence_length}: use 1 or more")
    for name in ("max_train_tokens", "max_held_out_tokens", "num_workers"):
        if getattr(data, name) < 0:
            raise UserError(f"config field data.{name}={getattr(data, name)}: use 0 or more")
    for name in ("max_train_tokens", "max_held_out_tokens"):
        if 0 < getattr(data, name) < data.sequence_length:
            raise UserError(
                f"config field data.{name}={getattr(data, name)}: fewer than the"
                f" {data.sequence_length} of data.sequence_length; use more, or 0 for all"
            )
    if not data.held_out and not 0 < data.held_out_fraction < 1:
        raise UserError(
            f"config field data.held_out_fraction={data.held_out_fraction}: use a share between 0"
            " and 1, or name held-out text by --config.data.held_out=FILES"
        )
    if data.held_out and data.held_out.strip() == data.train.strip():
        raise UserError(
            f"config field data.held_out={data.held_out!r}: is the training text; leave it empty to"
            " hold out a part of that"
        )


def _check_same(directory: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    names = [name for name in old | new if old.get(name) != new.get(name)]
    if names:
        changes = ", ".join(f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in names)
        raise UserError(
            f"{directory}: holds records of other settings ({changes}): use another --workdir, or"
            " delete that folder"
        )


def _write_info(directory: Path, info: RecordsInfo) -> None:
    temporary = directory / (_INFO_FILE + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(info), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(directory / _INFO_FILE)
    finally:
        temporary.unlink(missing_ok=True)


def _disk_error(directory: Path, budgets: dict[str, int], dtype: str, error: OSError) -> UserError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{directory}: cannot be written ({error.strerror}): use another --workdir"
        )
    width = np.dtype(dtype).itemsize
    need = f"up to {sum(budgets.values()) * width} bytes are needed"
    if not all(budgets.values()):
        need = f"{width} bytes a token are needed, --config.data.max_train_tokens caps them"
    return UserError(
        f"{directory}: the disk is full ({shutil.disk_usage(directory).free} bytes free): {need};"
        " free some or use another --workdir"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
