"""Batches of records: shuffled and resumable for training, in order for held-out text."""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from opt_deus_jax.data.records import Records
from opt_deus_jax.errors import UserError

# Records lie in the page cache: one thread hides the reading, more would only fight for the GIL.
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


class _NumberedRecords:
    """Records with their numbers, as a source for Grain."""

    def __init__(self, records: Records):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        return {"tokens": self._records[int(index)], "record": np.asarray(index, np.int64)}


def training_dataset(
    records: Records,
    *,
    batch_size: int,
    seed: int,
    num_epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Iterates over shuffled batches, each epoch in another order.

    The state of the iterator is the number of batches taken, so it means the same for any number
    of processes. It goes into an Orbax checkpoint as it is.

    Args:
        records: The training records.
        batch_size: Records a batch, over all processes.
        seed: Seed of the order.
        num_epochs: Times that each record is seen, an incomplete last batch dropped; None never
            ends.
        process_index: Which process this is: it gets every `process_count`-th row of a batch.
        process_count: How many processes share a batch.

    Returns:
        An iterator over {"tokens": [batch, sequence_length + 1] int32, "record": [batch] int64, the
        numbers of the records}, where batch is batch_size / process_count.

    Raises:
        UserError: A batch needs more records than there are, or cannot be shared evenly.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"config field training.batch_size={batch_size}: use a multiple of the"
            f" {process_count} processes"
        )
    if len(records) < batch_size:
        raise UserError(
            f"config field training.batch_size={batch_size}: there are only {len(records)} training"
            " records; lower it, give more text, or lower data.sequence_length"
        )
    # Grain adds the number of the epoch to the seed: unhashed, epoch 1 of seed 0 would be epoch 0
    # of seed 1.
    shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    dataset = grain.MapDataset.source(_NumberedRecords(records)).shuffle(shuffle_seed)
    dataset = dataset.repeat(num_epochs)
    if num_epochs is not None:
        dataset = dataset[: len(dataset) // batch_size * batch_size]
    rows = dataset[process_index::process_count]
    batches = rows.batch(batch_size // process_count, drop_remainder=True)
    return iter(batches.to_iter_dataset(_READ_OPTIONS))


def held_out_batches(records: Records, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Iterates once over all records in order, all batches of one shape.

    Args:
        records: The held-out records.
        batch_size: Rows a batch.

    Yields:
        {"tokens": [batch, sequence_length + 1] int32, "is_real": [batch] bool}. The last batch is
        filled up with rows of zeros that are not real: leave them out of means.

    Raises:
        UserError: The batch size is not positive.
    """
    if batch_size < 1:
        raise UserError(f"config field training.batch_size={batch_size}: use 1 or more")
    for start in range(0, len(records), batch_size):
        rows = [records[r] for r in range(start, min(start + batch_size, len(records)))]
        tokens = np.zeros((batch_size, records.sequence_length + 1), np.int32)
        tokens[: len(rows)] = rows
        yield {"tokens": tokens, "is_real": np.arange(batch_size) < len(rows)}
