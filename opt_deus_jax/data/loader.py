"""Batches of records: shuffled and resumable for training, in order for held-out text."""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from opt_deus_jax.data.records import Records
from opt_deus_jax.errors import UserError

# Records lie in the page cache: one thread hides the reading, more would only fight for the GIL.
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


def training_dataset(
    records: Records,
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    num_epochs: int | None = None,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Iterates over shuffled batches, each epoch in another order.

    The order is that of the whole batch, whatever part of it is read here, and the state of the
    iterator is the number of batches taken: both mean the same for any number of processes.

    Args:
        records: The training records.
        batch_size: Records a batch, over all processes.
        seed: Seed of the order.
        rows: Which rows of each batch to read; None reads all.
        num_epochs: Times that each record is seen, an incomplete last batch dropped; None never
            ends.

    Returns:
        An iterator over {"record": [batch_size] int64, the numbers of all records of the batch, and
        the columns of `Records.rows`, each [rows, sequence_length + 1]}.

    Raises:
        UserError: A batch needs more records than there are.
    """
    if batch_size < 1:
        raise UserError(f"config field training.batch_size={batch_size}: use 1 or more")
    if len(records) < batch_size:
        raise UserError(
            f"config field training.batch_size={batch_size}: there are only {len(records)} training"
            " records; lower it, give more text, or lower data.sequence_length"
        )
    wanted = np.arange(batch_size) if rows is None else np.asarray(rows)
    # Grain adds the number of the epoch to the seed: unhashed, epoch 1 of seed 0 would be epoch 0
    # of seed 1.
    shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    numbers = grain.MapDataset.range(len(records)).shuffle(shuffle_seed).repeat(num_epochs)

    def read(batch_numbers: np.ndarray) -> dict[str, np.ndarray]:
        columns = records.rows(batch_numbers[wanted].tolist())
        return {"record": batch_numbers.astype(np.int64), **columns}

    batches = numbers.batch(batch_size, drop_remainder=True).map(read)
    return iter(batches.to_iter_dataset(_READ_OPTIONS))


def held_out_batches(
    records: Records, batch_size: int
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Iterates once over all records in order, all batches of one shape.

    Args:
        records: The held-out records.
        batch_size: Rows a batch.

    Yields:
        (the columns of `Records.rows`, each [batch, sequence_length + 1]; is_real [batch] bool).
        The last batch is filled up with its first row, which is not real again: leave those out of
        means.

    Raises:
        UserError: The batch size is not positive.
    """
    if batch_size < 1:
        raise UserError(f"config field training.batch_size={batch_size}: use 1 or more")
    for start in range(0, len(records), batch_size):
        real = list(range(start, min(start + batch_size, len(records))))
        filler = [start] * (batch_size - len(real))
        yield records.rows(real + filler), np.arange(batch_size) < len(real)
