"""Puts examples of any length into rows of a fixed number of places."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Example(NamedTuple):
    """One example, no longer than a row.

    Attributes:
        tokens: Its tokens [length], any integer type.
        is_answer: Whether a token belongs to an answer [length], bool.
    """

    tokens: np.ndarray
    is_answer: np.ndarray


class FirstFit:
    """Packs a stream of examples: each goes into the first open row that has room for it.

    The number of open rows is bounded, so that time and memory stay linear in the stream; where
    another one is needed, the fullest is closed. The rows follow from the stream alone.
    """

    def __init__(self, places: int, max_open: int = 256):
        """Starts without any row.

        Args:
            places: Places of a row.
            max_open: Rows that are open at once; 1 or more.
        """
        self._places = places
        self._rows: list[list[Example]] = []
        self._room = np.zeros(0, np.int64)
        self._max_open = max_open

    def add(self, example: Example) -> list[list[Example]]:
        """Places one example.

        Args:
            example: At most as many tokens as a row has places.

        Returns:
            The rows that this closed: none or one.
        """
        length = len(example.tokens)
        if length > self._places:
            raise ValueError(f"{length} tokens in a row of {self._places} places")
        fitting = np.flatnonzero(self._room >= length)
        if len(fitting):
            self._rows[fitting[0]].append(example)
            self._room[fitting[0]] -= length
            return []
        closed = []
        if len(self._rows) == self._max_open:
            fullest = int(np.argmin(self._room))
            closed.append(self._rows.pop(fullest))
            self._room = np.delete(self._room, fullest)
        self._rows.append([example])
        self._room = np.append(self._room, self._places - length)
        return closed

    def finish(self) -> list[list[Example]]:
        """Closes all rows, oldest first, and returns them."""
        rows, self._rows, self._room = self._rows, [], np.zeros(0, np.int64)
        return rows


def place_dtype(token_dtype: str, places: int) -> np.dtype:
    """The type of one place of a row on disk.

    Args:
        token_dtype: Type of the tokens, uint16 or uint32.
        places: Places of a row.

    Returns:
        A structured type, little endian: "token", and "label", which is 2 * example + is_answer
        with the examples of a row counted from 1, and 0 for padding.
    """
    # An example with an answer has two tokens at least, which bounds its number.
    label_dtype = "uint16" if places + 1 < 1 << 16 else "uint32"
    return np.dtype(
        [
            ("token", np.dtype(token_dtype).newbyteorder("<")),
            ("label", np.dtype(label_dtype).newbyteorder("<")),
        ]
    )


def fill_row(examples: Sequence[Example], places: int, dtype: np.dtype) -> np.ndarray:
    """Writes examples one after another into a row; the rest is padding.

    Args:
        examples: Together at most as many tokens as there are places.
        places: Places of the row.
        dtype: `place_dtype`.

    Returns:
        The row [places]; padding is token 0 with label 0.
    """
    row = np.zeros(places, dtype)
    start = 0
    for number, example in enumerate(examples, start=1):
        end = start + len(example.tokens)
        row["token"][start:end] = example.tokens
        row["label"][start:end] = 2 * number + example.is_answer
        start = end
    return row
