import json
from pathlib import Path

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

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


def test_resuming_through_orbax(records: Records, tmp_path: Path):
    uninterrupted = numbers(training_dataset(records, batch_size=5, seed=3), 12)
    first = training_dataset(records, batch_size=5, seed=3)
    before = numbers(first, 7)
    with ocp.training.Checkpointer(str(tmp_path)) as checkpointer:
        checkpointer.save_checkpointables(7, {"state": {"step": np.asarray(7)}, "data": first})
    second = training_dataset(records, batch_size=5, seed=3)
    with ocp.training.Checkpointer(str(tmp_path)) as checkpointer:
        loaded = checkpointer.load_checkpointables(7, {"data": second})
    assert loaded["data"] is second
    assert before + numbers(second, 5) == uninterrupted


def test_processes_share_each_batch(records: Records):
    whole = training_dataset(records, batch_size=6, seed=3)
    parts = [
        training_dataset(records, batch_size=6, seed=3, process_index=i, process_count=2)
        for i in range(2)
    ]
    for _ in range(10):
        rows = next(whole)["record"]
        for i, part in enumerate(parts):
            np.testing.assert_array_equal(next(part)["record"], rows[i::2])
    assert parts[0].get_state() == parts[1].get_state() == whole.get_state()


def test_finite_epochs_end_together_for_all_processes(records: Records):
    for process_index in range(2):
        part = training_dataset(
            records,
            batch_size=6,
            seed=3,
            num_epochs=1,
            process_index=process_index,
            process_count=2,
        )
        assert len(list(part)) == COUNT // 6


def test_one_record(records: Records):
    one = Records(records.tokens[: LENGTH + 1], LENGTH)
    assert numbers(training_dataset(one, batch_size=1, seed=0), 3) == [0, 0, 0]


def test_unusable_batch_sizes(records: Records):
    with pytest.raises(UserError, match="training.batch_size=24: there are only 23"):
        training_dataset(records, batch_size=24, seed=0)
    with pytest.raises(UserError, match="multiple of the 2 processes"):
        training_dataset(records, batch_size=5, seed=0, process_count=2)
    with pytest.raises(UserError, match="training.batch_size=0"):
        training_dataset(records, batch_size=0, seed=0)
    with pytest.raises(UserError, match="batch_size=0"):
        next(held_out_batches(records, 0))


@pytest.mark.parametrize("batch_size", [1, 5, 23, 40])
def test_held_out_batches_hold_each_record_once_in_order(records: Records, batch_size: int):
    batches = list(held_out_batches(records, batch_size))
    assert {batch["tokens"].shape for batch in batches} == {(batch_size, LENGTH + 1)}
    assert {batch["tokens"].dtype for batch in batches} == {np.dtype(np.int32)}
    real = np.concatenate([batch["tokens"][batch["is_real"]] for batch in batches])
    np.testing.assert_array_equal(real, [records[i] for i in range(COUNT)])
