"""Encodes a stream of items in chunks, in several processes where there is enough to do."""

import collections
import itertools
import multiprocessing
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from opt_deus_jax.errors import UserError

# Held-out text is a small share: larger chunks of it would mean reading far past a small budget.
_CHUNK_CHARACTERS = 1 << 16
# Starting processes takes seconds: this much text is first encoded without them.
_MIN_PARALLEL_CHARACTERS = 1 << 23


class Encoded(NamedTuple):
    """Tokens of some items, one after another.

    Attributes:
        tokens: All tokens [total], uint32.
        lengths: Tokens of each item [items], int64.
        is_answer: Whether a token belongs to an answer [total], bool; all False for plain text.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    is_answer: np.ndarray


class Item(Protocol):
    """What is encoded: anything whose `len` is about the number of its characters."""

    def __len__(self) -> int: ...


ItemT = TypeVar("ItemT", bound=Item)


def encode_chunks(
    labelled: Iterable[tuple[str, ItemT]],
    encode: Callable[[list[ItemT]], Encoded],
    num_workers: int,
) -> Generator[tuple[str, Encoded], None, None]:
    """Encodes items, in several processes where there is enough text.

    Args:
        labelled: Items, each with a label (the name of its split). Read ahead by a few chunks.
        encode: Encodes some items; it must survive pickling.
        num_workers: Processes that encode; 0 means one a core.

    Yields:
        A label, and some items of it encoded. The order of the items of a label is kept, whatever
        the number of processes.

    Raises:
        UserError: A process died.
    """
    num_workers = num_workers or os.cpu_count() or 1
    chunks = _chunks(labelled)
    characters = 0
    for label, items in chunks:
        yield label, encode(items)
        characters += sum(map(len, items))
        if num_workers > 1 and characters >= _MIN_PARALLEL_CHARACTERS:
            yield from _encode_in_processes(chunks, encode, num_workers)


def _encode_in_processes(
    chunks: Iterator[tuple[str, list[Any]]], encode: Callable[[list[Any]], Encoded], workers: int
) -> Iterator[tuple[str, Encoded]]:
    # The parent has threads of JAX, with which forking can deadlock.
    executor = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(encode,),
    )
    pending: collections.deque[tuple[str, Future]] = collections.deque()
    try:
        # A bounded queue instead of `map`, which would first read the whole corpus.
        for label, items in itertools.islice(chunks, 4 * workers):
            pending.append((label, executor.submit(_encode_in_worker, items)))
        while pending:
            label, future = pending.popleft()
            yield label, future.result()
            for next_label, items in itertools.islice(chunks, 1):
                pending.append((next_label, executor.submit(_encode_in_worker, items)))
    except BrokenProcessPool as error:
        raise UserError(
            "tokenising: a worker process died, perhaps for want of memory: use fewer by"
            " --config.data.num_workers=1"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _chunks(labelled: Iterable[tuple[str, ItemT]]) -> Iterator[tuple[str, list[ItemT]]]:
    chunks: dict[str, list[ItemT]] = collections.defaultdict(list)
    characters: dict[str, int] = collections.defaultdict(int)
    for label, item in labelled:
        chunks[label].append(item)
        characters[label] += len(item)
        if characters[label] >= _CHUNK_CHARACTERS:
            yield label, chunks.pop(label)
            characters[label] = 0
    yield from chunks.items()


_worker_encode: Callable[[list[Any]], Encoded] | None = None


def _start_worker(encode: Callable[[list[Any]], Encoded]) -> None:
    global _worker_encode
    _worker_encode = encode
    # One process a core is enough; threads of the tokenizer in each would fight for them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _encode_in_worker(items: list[Any]) -> Encoded:
    assert _worker_encode is not None
    return _worker_encode(items)
