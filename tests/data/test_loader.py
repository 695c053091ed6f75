import json

import numpy as np
import pytest

from opt_deus_jax.data.loader import held_out_batches, training_dataset
from opt_deus_jax.data.records import Records
from opt_deus_jax.errors import UserError

LENGTH = 4
COUNT = 23


@pytest.fixture
def records() -> Records:
    return Records(np.arange(COUNT * LENGTH + 1, dtype=np.uint16), LENGTH)


def numbers(iterator, steps: int) -> list[int]:
    return np.concatenate([next(iterator)["record"] for _ in range(steps)]).tolist()


def test_batches_hold_the_records_that_they_name(records: Records):
    for batch in training_dataset(records, batch_size=5, seed=1, num_epochs=2):
        assert batch["tokens"].shape == (5, LENGTH + 1)
        assert batch["tokens"].dtype == np.int32
        assert batch["record"].shape == (5,)
        assert batch["record"].dtype == np.int64
        expected = batch["record"][:, None] * LENGTH + np.arange(LENGTH + 1)
        np.testing.assert_array_equal(batch["tokens"], expected)


def test_each_epoch_sees_every_record_once_in_another_order(records: Records):
    seen = numbers(training_dataset(records, batch_size=COUNT, seed=0), 3)
    epochs = [seen[i : i + COUNT] for i in range(0, 3 * COUNT, COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert list(range(COUNT)) not in epochs


def test_batches_go_on_over_the_end_of_an_epoch(records: Records):
    whole = numbers(training_dataset(records, batch_size=COUNT, seed=0), 5)
    assert numbers(training_dataset(records, batch_size=5, seed=0), COUNT) == whole
    assert len(list(training_dataset(records, batch_size=5, seed=0, num_epochs=2))) == 9


def test_neighbouring_seeds_share_no_epoch(records: Records):
    orders = set()
    for seed in range(3):
        seen = numbers(training_dataset(records, batch_size=COUNT, seed=seed), 3)
        orders |= {tuple(seen[i : i + COUNT]) for i in range(0, 3 * COUNT, COUNT)}
    assert len(orders) == 9


def test_resuming_gives_the_uninterrupted_sequence(records: Records):
    uninterrupted = numbers(training_dataset(records, batch_size=5, seed=3), 20)
    for stop in (0, 3, 4, 5, 14):
        first = training_dataset(records, batch_size=5, seed=3)
        before = numbers(first, stop) if stop else []
        state = json.loads(json.dumps(first.get_state()))
        second = training_dataset(records, batch_size=5, seed=3)
        second.set_state(state)
        assert before + numbers(second, 20 - stop) == uninterrupted


def test_each_process_reads_its_rows_of_the_same_batches(records: Records):
    whole = training_dataset(records, batch_size=6, seed=3)
    shares = ((0, 2, 4), (1, 3, 5), (1, 2))
    parts = [training_dataset(records, batch_size=6, seed=3, rows=rows) for rows in shares]
    for _ in range(10):
        batch = next(whole)
        for rows, part in zip(shares, parts, strict=True):
            read = next(part)
            np.testing.assert_array_equal(read["record"], batch["record"])
            np.testing.assert_array_equal(read["tokens"], batch["tokens"][list(rows)])
    assert all(part.get_state() == whole.get_state() for part in parts)


def test_finite_epochs_leave_out_the_incomplete_batch(records: Records):
    batches = training_dataset(records, batch_size=6, seed=3, num_epochs=1)
    assert len(list(batches)) == COUNT // 6


def test_one_record(records: Records):
    one = Records(records.tokens[: LENGTH + 1], LENGTH)
    assert numbers(training_dataset(one, batch_size=1, seed=0), 3) == [0, 0, 0]


def test_unusable_batch_sizes(records: Records):
    with pytest.raises(UserError, match="training.batch_size=24: there are only 23"):
        training_dataset(records, batch_size=24, seed=0)
    with pytest.raises(UserError, match="training.batch_size=0"):
        training_dataset(records, batch_size=0, seed=0)
    with pytest.raises(UserError, match="batch_size=0"):
        next(held_out_batches(records, 0))


@pytest.mark.parametrize("batch_size", [1, 5, 23, 40])
def test_held_out_batches_hold_each_record_once_in_order(records: Records, batch_size: int):
    batches = list(held_out_batches(records, batch_size))
    assert {columns["tokens"].shape for columns, _ in batches} == {(batch_size, LENGTH + 1)}
    assert {columns["tokens"].dtype for columns, _ in batches} == {np.dtype(np.int32)}
    real = np.concatenate([columns["tokens"][is_real] for columns, is_real in batches])
    np.testing.assert_array_equal(real, [records[i] for i in range(COUNT)])
