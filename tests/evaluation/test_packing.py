"""Packed rows hold every sequence whole, next to few empty places."""

import numpy as np
import pytest

from opt_deus_jax.evaluation.packing import (
    Plan,
    Scored,
    batches,
    lay_out,
    pad_rows,
    plan_rows,
    row_length,
)


def _questions(seed: int, count: int) -> list[Scored]:
    """Choices behind shared contexts, some of them of one token or the same."""
    draw = np.random.default_rng(seed)
    sequences = []
    for _ in range(count):
        context = tuple(draw.integers(0, 9, draw.integers(1, 90)).tolist())
        for _ in range(4):
            answer = tuple(draw.integers(0, 9, draw.integers(1, 6)).tolist())
            sequences.append(Scored((context + answer)[:-1], answer))
    return sequences


def test_every_sequence_reads_exactly_its_own_tokens() -> None:
    sequences = _questions(0, 60)
    seen = []
    for plan in plan_rows([sequence.tokens for sequence in sequences]):
        row = lay_out(plan.members, sequences)
        assert len(row.tokens) <= plan.length
        places, ends = np.arange(len(row.tokens)), np.array(row.ends)
        asked: dict[int, list[tuple[int, int]]] = {}
        for place, target, number in row.predictions:
            asked.setdefault(number, []).append((place, target))
        assert sorted(asked) == sorted(plan.members)
        for number, predictions in asked.items():
            last = predictions[-1][0]
            path = places[(places <= last) & (last < ends)]
            assert tuple(np.array(row.tokens)[path].tolist()) == sequences[number].tokens
            np.testing.assert_array_equal(np.array(row.positions)[path], np.arange(len(path)))
            targets = sequences[number].targets
            assert [target for _, target in predictions] == list(targets)
            assert [place for place, _ in predictions] == path[-len(targets) :].tolist()
        seen += plan.members
    assert sorted(seen) == list(range(len(sequences)))


def test_contexts_are_computed_once_and_rows_are_full() -> None:
    sequences = _questions(1, 200)
    plans = plan_rows([sequence.tokens for sequence in sequences])
    contexts = sum(len(sequences[i].tokens) for i in range(0, len(sequences), 4))
    rows = [lay_out(plan.members, sequences) for plan in plans]
    computed = sum(len(row.tokens) for row in rows)
    # Answers add at most 5 tokens to a context; alone, the sequences would take four times it.
    assert computed < contexts + 200 * 4 * 5
    assert computed > 0.95 * sum(plan.length for plan in plans)


@pytest.mark.parametrize(
    ("tokens", "length"),
    [(1, 256), (257, 512), (1024, 1024), (1025, 1152), (2049, 2304), (8000, 8192)],
)
def test_rows_come_in_few_lengths(tokens: int, length: int) -> None:
    assert row_length(tokens) == length


def test_batches_hold_rows_of_one_length_in_multiples_of_the_shards() -> None:
    plans = [Plan(512, [0])] * 3 + [Plan(256, [1])] * 9
    made = list(batches(plans, 1024, 2))
    assert [(batch[0].length, len(batch)) for batch in made] == [
        *((512, 2), (512, 2)),
        *((256, 4), (256, 4), (256, 2)),
    ]
    assert sum(bool(plan.members) for batch in made for plan in batch) == 12


def test_padding_sees_only_itself() -> None:
    sequences = [Scored((1, 2), (3,))]
    arrays = pad_rows([lay_out([0], sequences), lay_out([], sequences)], 4)
    assert arrays["ends"].tolist() == [[2, 2, 3, 4], [1, 2, 3, 4]]
    assert arrays["tokens"].tolist() == [[1, 2, 0, 0], [0, 0, 0, 0]]
