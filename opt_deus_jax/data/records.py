"""Fixed-length token records on disk, read at random."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opt_deus_jax.data.packing import place_dtype
from opt_deus_jax.errors import UserError

SPLITS = ("train", "held_out")
INFO_FILE = "records.json"


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """What one split holds.

    Attributes:
        documents: Documents or examples of which at least one token was kept.
        records: Records of sequence_length + 1 tokens; of text, each shares one with the next.
        tokens: For text: tokens that are predicted once an epoch, records * sequence_length. For
            instructions: tokens of all examples, padding left out.
        predicted_tokens: Tokens whose prediction counts in the loss, once an epoch.
        truncated: Examples that lost the end of their answer to sequence_length.
        dropped: Examples left out, as no token of an answer lay within sequence_length.
        sha256: Hexadecimal hash of the file.
    """

    documents: int
    records: int
    tokens: int
    predicted_tokens: int
    truncated: int
    dropped: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class RecordsInfo:
    """The content of `records.json`.

    Attributes:
        settings: Everything that the records follow from, by name, but for the text itself.
        sources: The files that `data.train` and `data.held_out` name, each as [name, sha256],
            or [name, None] where enough text was found before it.
        dtype: Type of the tokens on disk, uint16 or uint32, little endian.
        splits: What each of `SPLITS` holds.
    """

    settings: dict[str, Any]
    sources: dict[str, list[list[str | None]]]
    dtype: str
    splits: dict[str, SplitInfo]


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of one split, memory-mapped.

    Record r of text is tokens[r * L : r * L + L + 1]: each token is predicted once. A record of
    instructions is tokens[r * (L + 1) : (r + 1) * (L + 1)]: records share nothing.

    Attributes:
        tokens: All tokens of the split, uint16 or uint32.
        sequence_length: L, the tokens that a record predicts.
        labels: For instructions, of the shape of `tokens`: 2 * example + is_answer, 0 for
            padding; None for text.
    """

    tokens: np.ndarray
    sequence_length: int
    labels: np.ndarray | None = None

    @property
    def _stride(self) -> int:
        return self.sequence_length + (self.labels is not None)

    def __len__(self) -> int:
        shared = self.labels is None
        return max(0, len(self.tokens) - shared) // self._stride

    def __getitem__(self, index: int) -> np.ndarray:
        """Reads the tokens of one record.

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
            {"tokens": [numbers, sequence_length + 1] int32}, and for instructions, of the same
            shape, "example" int32 (number of the example within its record from 1, 0 for padding)
            and "is_answer" bool (the token belongs to an answer).

        Raises:
            IndexError: There is no such record.
        """
        chosen = np.asarray(numbers, np.int64)
        if np.any((chosen < 0) | (chosen >= len(self))):
            raise IndexError(f"records {chosen.tolist()} of {len(self)}")
        places = chosen[:, None] * self._stride + np.arange(self.sequence_length + 1)
        batch = {"tokens": self.tokens[places].astype(np.int32)}
        if self.labels is not None:
            labels = self.labels[places].astype(np.int32)
            batch |= {"example": labels >> 1, "is_answer": (labels & 1).astype(bool)}
        return batch


def load_info(directory: str | os.PathLike[str]) -> RecordsInfo:
    """Reads `records.json`.

    Args:
        directory: The folder of `prepare_records`.

    Returns:
        Its content.

    Raises:
        UserError: The file is missing or unreadable.
    """
    path = Path(directory) / INFO_FILE
    if not path.exists():
        raise UserError(f"{path}: no records here: run experiments.prepare_data first")
    try:
        content = json.loads(path.read_bytes())
        splits = {name: SplitInfo(**split) for name, split in content.pop("splits").items()}
        return RecordsInfo(splits=splits, **content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: not a list of records of this version: delete {path.parent} and run"
            " experiments.prepare_data"
        ) from error


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
    length = info.settings["sequence_length"]
    if info.settings["format"] == "text":
        dtype = np.dtype(info.dtype).newbyteorder("<")
        expected_size = (expected.tokens + 1) * dtype.itemsize
    else:
        dtype = place_dtype(info.dtype, length + 1)
        expected_size = expected.records * (length + 1) * dtype.itemsize
    size = path.stat().st_size
    if size != expected_size:
        raise UserError(f"{path}: {size} bytes where {expected_size} were written: {remedy}")
    if verify and file_sha256(path) != expected.sha256:
        raise UserError(f"{path}: its sha256 is not that of {INFO_FILE}: {remedy}")
    places = np.memmap(path, dtype, "r")
    if dtype.names:
        return Records(places["token"], length, places["label"])
    return Records(places, length)


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_batches(
    tokens: np.ndarray, batch_size: int, sequence_length: int, count: int
) -> list[np.ndarray]:
    """The first batches of a text, in its order.

    Args:
        tokens: Token ids [n].
        batch_size: Records a batch.
        sequence_length: Tokens a record; a batch holds one more, which is only predicted.
        count: Batches.

    Returns:
        int32 [batch_size, sequence_length + 1] of each.

    Raises:
        UserError: The text is too short.
    """
    records, needed = Records(tokens, sequence_length), batch_size * count
    if needed > len(records):
        raise UserError(
            f"config field data.max_train_tokens: the text has {len(records)} records of "
            f"{sequence_length} tokens, {count} steps of {batch_size} take {needed}; give more "
            "text, in another --workdir, or take fewer steps"
        )
    starts = range(0, needed, batch_size)
    return [records.rows(range(start, start + batch_size))["tokens"] for start in starts]
