import numpy as np
import pytest

from opt_deus_jax.data.packing import Example, FirstFit, fill_row, place_dtype
from opt_deus_jax.data.records import Records


def random_examples(seed: int, count: int, longest: int) -> list[Example]:
    """Examples whose tokens are all different, so that none can be lost or doubled unseen."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count)
    flat = 1 + rng.permutation(int(lengths.sum()))
    return [
        Example(tokens, rng.random(len(tokens)) < 0.5)
        for tokens in np.split(flat, np.cumsum(lengths)[:-1])
    ]


def pack(examples: list[Example], places: int, max_open: int) -> list[list[Example]]:
    packer = FirstFit(places, max_open)
    return [row for example in examples for row in packer.add(example)] + packer.finish()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("max_open", [1, 3, 256])
def test_packing_loses_and_doubles_nothing(seed: int, max_open: int):
    places = 5 + 7 * seed
    examples = random_examples(seed, 120, places)
    rows = pack(examples, places, max_open)
    assert all(sum(len(example.tokens) for example in row) <= places for row in rows)
    packed = {int(example.tokens[0]): example for row in rows for example in row}
    assert sum(len(row) for row in rows) == len(packed) == len(examples)
    assert all(packed[int(example.tokens[0])] is example for example in examples)
    # A row is opened only where no open one has room: two neighbours that are both half empty
    # would have been one.
    if max_open == 256:
        used = [sum(len(example.tokens) for example in row) for row in rows]
        assert sum(2 * tokens <= places for tokens in used) <= 1
        assert rows == pack(examples, places, max_open)


def test_first_fit_by_hand():
    lengths = [6, 5, 4, 5, 2, 10, 3]
    examples = [Example(np.full(n, i), np.zeros(n, bool)) for i, n in enumerate(lengths)]
    numbers = [[int(e.tokens[0]) for e in row] for row in pack(examples, 10, 256)]
    assert numbers == [[0, 2], [1, 3], [4, 6], [5]]
    numbers = [[int(e.tokens[0]) for e in row] for row in pack(examples, 10, 1)]
    assert numbers == [[0], [1, 2], [3, 4], [5], [6]]


def test_an_example_longer_than_a_row_is_a_fault_of_the_caller():
    with pytest.raises(ValueError, match="5 tokens in a row of 4"):
        FirstFit(4).add(Example(np.arange(5), np.zeros(5, bool)))


@pytest.mark.parametrize("token_dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("seed", range(4))
def test_rows_come_back_as_they_were_packed(seed: int, token_dtype: str):
    places = 9 + 20 * seed
    rows = pack(random_examples(seed, 50, places), places, 4)
    dtype = place_dtype(token_dtype, places)
    flat = np.concatenate([fill_row(row, places, dtype) for row in rows])
    records = Records(flat["token"], places - 1, flat["label"])
    assert len(records) == len(rows)
    batch = records.rows(list(range(len(rows))))
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        "tokens": ((len(rows), places), np.int32),
        "example": ((len(rows), places), np.int32),
        "is_answer": ((len(rows), places), bool),
    }
    for number, row in enumerate(rows):
        tokens, example, is_answer = (batch[name][number] for name in batch)
        for position, expected in enumerate(row, start=1):
            np.testing.assert_array_equal(tokens[example == position], expected.tokens)
            np.testing.assert_array_equal(is_answer[example == position], expected.is_answer)
        # Examples follow each other without a gap, padding comes last.
        used = sum(len(expected.tokens) for expected in row)
        assert (np.diff(example[:used]) >= 0).all()
        assert not any(column[number, used:].any() for column in batch.values())
        np.testing.assert_array_equal(records[number], tokens)


def test_labels_of_the_longest_rows_fit():
    for places in (65534, 65535):
        dtype = place_dtype("uint16", places)
        assert 2 * (places // 2) + 1 <= np.iinfo(dtype["label"]).max
    assert place_dtype("uint16", 2049).itemsize == 4


def test_records_of_instructions_do_not_overlap():
    records = Records(np.arange(10, dtype=np.uint16), 4, np.full(10, 3, np.uint16))
    np.testing.assert_array_equal(records.rows([1, 0])["tokens"], [range(5, 10), range(5)])
    with pytest.raises(IndexError, match="of 2"):
        records.rows([2])
