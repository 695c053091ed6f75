"""Writes the records of one split into a file that gets its name when it is whole."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from opt_deus_jax.data.chunks import Encoded
from opt_deus_jax.data.packing import Example, FirstFit, fill_row, place_dtype
from opt_deus_jax.data.records import SplitInfo, file_sha256
from opt_deus_jax.errors import UserError


class SplitWriter:
    """A file under a temporary name; the subclasses say what is written into it."""

    def __init__(self, path: Path, budget: int, sequence_length: int):
        """Names the file.

        Args:
            path: Its final name.
            budget: Tokens after which it is full; 0 means never.
            sequence_length: Tokens that a record predicts.
        """
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._budget = budget
        self._length = sequence_length
        self._documents = 0
        self._tokens = 0

    def __enter__(self) -> "SplitWriter":
        self._file = self._temporary.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        # Closing flushes: on a full disk it fails too, and would hide the first error.
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    @property
    def is_full(self) -> bool:
        """Whether the budget is used up."""
        raise NotImplementedError

    def append(self, encoded: Encoded) -> int:
        """Appends documents, up to the budget; returns the tokens taken."""
        raise NotImplementedError

    def finish(self, split: str) -> SplitInfo:
        """Completes the records and makes the file durable; `split` is for messages."""
        raise NotImplementedError

    def publish(self) -> None:
        """Gives the file its name."""
        self._temporary.replace(self._path)

    def _hash_durable(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        return file_sha256(self._temporary)

    def _too_little(self, split: str, found: str, change: str) -> UserError:
        more = " (or raise data.held_out_fraction)" if split == "held_out" else ""
        return UserError(
            f"config field data.{split}: {self._documents} documents with {found}; give more"
            f" text{more}, or {change} data.sequence_length"
        )


class TextWriter(SplitWriter):
    """Writes text as one stream of tokens; the incomplete last record is dropped."""

    def __init__(self, path: Path, budget: int, dtype: str, sequence_length: int):
        """As `SplitWriter`, with the type of the tokens on disk."""
        super().__init__(path, budget, sequence_length)
        self._dtype = np.dtype(dtype).newbyteorder("<")

    @property
    def is_full(self) -> bool:
        """Whether the budget is used up."""
        return bool(self._budget) and self._room == 0

    @property
    def _room(self) -> int:
        # One token more than are predicted: the first one has nothing before it.
        return max(0, self._budget + 1 - self._tokens)

    def append(self, encoded: Encoded) -> int:
        """Appends documents, the last one cut at the budget; returns the tokens taken."""
        kept = encoded.tokens[: self._room] if self._budget else encoded.tokens
        self._file.write(kept.astype(self._dtype).tobytes())
        starts = np.cumsum(encoded.lengths) - encoded.lengths
        self._documents += int(np.sum(starts < len(kept)))
        self._tokens += len(kept)
        return len(kept)

    def finish(self, split: str) -> SplitInfo:
        """Drops the incomplete record at the end and makes the file durable."""
        records = max(0, self._tokens - 1) // self._length
        if not records:
            raise self._too_little(
                split, f"{self._tokens} tokens, one record needs {self._length + 1}", "lower"
            )
        tokens = records * self._length
        self._file.truncate((tokens + 1) * self._dtype.itemsize)
        return SplitInfo(self._documents, records, tokens, tokens, 0, 0, self._hash_durable())


class InstructionWriter(SplitWriter):
    """Writes whole examples into rows: one each, or as many as fit."""

    def __init__(self, path: Path, budget: int, dtype: str, sequence_length: int, packing: bool):
        """As `TextWriter`; `packing` says whether a row takes several examples."""
        super().__init__(path, budget, sequence_length)
        self._dtype = place_dtype(dtype, sequence_length + 1)
        self._packer = FirstFit(sequence_length + 1) if packing else None
        self._records = 0
        self._predicted = 0
        self._truncated = 0
        self._dropped = 0

    @property
    def is_full(self) -> bool:
        """Whether the budget is used up."""
        return bool(self._budget) and self._tokens >= self._budget

    def append(self, encoded: Encoded) -> int:
        """Appends examples until the budget is reached; returns the tokens taken.

        An example that is longer than a row loses its end; one that then has no token of an answer
        left is dropped.
        """
        before = self._tokens
        ends = np.cumsum(encoded.lengths)
        for start, end in zip(ends - encoded.lengths, ends, strict=True):
            if self.is_full:
                break
            kept = slice(start, min(end, start + self._length + 1))
            example = Example(encoded.tokens[kept], encoded.is_answer[kept])
            predicted = int(example.is_answer[1:].sum())
            if not predicted:
                self._dropped += 1
                continue
            self._truncated += int(kept.stop < end)
            self._documents += 1
            self._tokens += len(example.tokens)
            self._predicted += predicted
            self._write([[example]] if self._packer is None else self._packer.add(example))
        return self._tokens - before

    def finish(self, split: str) -> SplitInfo:
        """Writes the rows that are still open and makes the file durable."""
        if self._packer is not None:
            self._write(self._packer.finish())
        if not self._records:
            raise self._too_little(
                split,
                f"an answer within data.sequence_length={self._length}, {self._dropped} without",
                "raise",
            )
        return SplitInfo(
            documents=self._documents,
            records=self._records,
            tokens=self._tokens,
            predicted_tokens=self._predicted,
            truncated=self._truncated,
            dropped=self._dropped,
            sha256=self._hash_durable(),
        )

    def _write(self, rows: Sequence[Sequence[Example]]) -> None:
        for row in rows:
            self._file.write(fill_row(row, self._length + 1, self._dtype).tobytes())
        self._records += len(rows)
