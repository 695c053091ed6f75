"""Questions laid out in rows so that what they share is computed once and little is padded.

A row holds several token sequences as a tree in depth-first order: sequences that begin alike share
their first tokens. A token sees its ancestors, which are the tokens before it whose subtree has not
ended yet, and its position is its depth; so each sequence is computed as if it stood alone.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

Tokens = tuple[int, ...]

# Rows shorter than this would make many small matrix products.
SHORTEST_ROW = 256
# Above this, rows come in steps of an eighth: 1024, 1152, 1280, ..., 2048, 2304, ...
_EIGHTH_STEPS_FROM = 1024
# A neighbour that shares a smaller part than this is better placed wherever it fits.
_WORTH_SHARING = 1 / 3


class Scored(NamedTuple):
    """A sequence of which the last tokens each predict one.

    Attributes:
        tokens: What the network reads.
        targets: What its last `len(targets)` tokens are to predict.
    """

    tokens: Tokens
    targets: Tokens


class Plan(NamedTuple):
    """Which sequences share a row.

    Attributes:
        length: Places of the row.
        members: Numbers of its sequences.
    """

    length: int
    members: list[int]


class Row(NamedTuple):
    """Sequences laid out as a tree; the lists have an entry for each token.

    Attributes:
        tokens: Token ids.
        positions: Depth in the tree.
        ends: Place after the last token that sees this one.
        predictions: (place, target, number of the sequence).
    """

    tokens: list[int]
    positions: list[int]
    ends: list[int]
    predictions: list[tuple[int, int, int]]


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens at the beginning that two sequences have in common."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)


def row_length(tokens: int) -> int:
    """The length of the row that so many tokens need; few lengths mean few compiled programs."""
    length = SHORTEST_ROW
    while length < tokens:
        if length >= _EIGHTH_STEPS_FROM and 2 * length >= tokens:
            step = length // 8
            return -(-tokens // step) * step
        length *= 2
    return length


def plan_rows(sequences: Sequence[Tokens]) -> list[Plan]:
    """Shares out sequences over rows.

    Neighbours in sorted order that begin alike stay together; these groups are packed by first fit,
    the largest first.

    Args:
        sequences: Token ids of each.

    Returns:
        Rows, longest first.
    """
    groups = _groups(sequences)
    order = sorted(range(len(groups)), key=lambda number: -groups[number][0])
    free = np.zeros(len(groups), np.int64)
    plans: list[Plan] = []
    for number in order:
        size, members = groups[number]
        fitting = np.flatnonzero(free[: len(plans)] >= size)
        if fitting.size:
            place = int(fitting[0])
        else:
            place = len(plans)
            plans.append(Plan(row_length(size), []))
            free[place] = plans[place].length
        plans[place].members.extend(members)
        free[place] -= size
    return sorted(plans, key=lambda plan: -plan.length)


def _groups(sequences: Sequence[Tokens]) -> list[tuple[int, list[int]]]:
    groups: list[tuple[int, list[int]]] = []
    previous: Tokens = ()
    for number in sorted(range(len(sequences)), key=sequences.__getitem__):
        tokens = sequences[number]
        shared = shared_length(previous, tokens)
        added = len(tokens) - shared
        previous = tokens
        if groups and shared >= _WORTH_SHARING * len(tokens):
            size, members = groups[-1]
            # Longer groups would leave gaps at the ends of rows.
            if size + added <= max(SHORTEST_ROW, 2 * len(tokens)):
                groups[-1] = (size + added, [*members, number])
                continue
        groups.append((len(tokens), [number]))
    return groups


def lay_out(members: Sequence[int], sequences: Sequence[Scored]) -> Row:
    """Writes sequences into a row.

    Args:
        members: Numbers of the sequences of the row.
        sequences: All sequences.

    Returns:
        The row, unpadded.
    """
    row = Row([], [], [], [])
    # Places of the tokens of the sequence that was written last.
    path: list[int] = []
    previous: Tokens = ()
    for number in sorted(members, key=lambda member: sequences[member].tokens):
        tokens, targets = sequences[number]
        shared = shared_length(previous, tokens)
        first, last = len(row.tokens), len(row.tokens) + len(tokens) - shared
        for place in path[shared:]:
            row.ends[place] = first
        path[shared:] = range(first, last)
        row.tokens.extend(tokens[shared:])
        row.positions.extend(range(shared, len(tokens)))
        row.ends.extend([0] * (last - first))
        predicting = path[len(path) - len(targets) :]
        row.predictions.extend(
            (place, target, number) for place, target in zip(predicting, targets, strict=True)
        )
        previous = tokens
    for place in path:
        row.ends[place] = len(row.tokens)
    return row


def batches(plans: Sequence[Plan], batch_tokens: int, shards: int) -> Iterator[list[Plan]]:
    """Groups rows of one length into batches.

    Args:
        plans: Rows, sorted by length.
        batch_tokens: Tokens a batch, roughly.
        shards: The number of rows is a multiple of this.

    Yields:
        Batches; the last of each length has half as many rows as often as they suffice, so that
        few programs are compiled and few rows are empty.
    """
    start = 0
    while start < len(plans):
        length = plans[start].length
        rows = max(batch_tokens // length // shards, 1) * shards
        batch = [plan for plan in plans[start : start + rows] if plan.length == length]
        start += len(batch)
        while len(batch) * 2 <= rows and rows % (2 * shards) == 0:
            rows //= 2
        yield batch + [Plan(length, [])] * (rows - len(batch))


def pad_rows(rows: Sequence[Row], length: int) -> dict[str, np.ndarray]:
    """Stacks rows; a padded token sees itself and nothing sees it.

    Args:
        rows: Of at most `length` tokens each.
        length: Tokens of each row.

    Returns:
        "tokens", "positions" and "ends", int32 [len(rows), length].
    """
    shape = (len(rows), length)
    arrays = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions")}
    arrays["ends"] = np.broadcast_to(np.arange(1, length + 1, dtype=np.int32), shape).copy()
    for number, row in enumerate(rows):
        for name, array in arrays.items():
            values = getattr(row, name)
            array[number, : len(values)] = values
    return arrays
