import pathlib

import pytest
import tokenizers

from opt_deus_jax.config import DataConfig
from opt_deus_jax.data.instructions import (
    encode_conversations,
)
from opt_deus_jax.data.preparation import prepare_records
from opt_deus_jax.data.records import load_info, load_records
from opt_deus_jax.errors import UserError
from tests.data.tiny_instructions import (
    CHATML,
    LLAMA3,
    alpaca_rows,
    examples_of,
    make_tokenizer,
    read,
    train_backend,
    write_jsonl,
)


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    return train_backend()


def make_config(path: pathlib.Path, **fields: object) -> DataConfig:
    defaults = {
        "train": str(path),
        "format": "alpaca",
        "held_out_fraction": 0.3,
        "sequence_length": 64,
        "max_held_out_tokens": 0,
        "num_workers": 1,
    }
    return DataConfig(**(defaults | fields))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("packing", [True, False])
def test_records_hold_every_example_once(
    backend: tokenizers.Tokenizer, tmp_path: pathlib.Path, packing: bool
):
    tokenizer = make_tokenizer(backend, CHATML)
    path = write_jsonl(tmp_path / "a.jsonl", alpaca_rows(60))
    data = make_config(path, packing=packing, sequence_length=90)
    info = prepare_records(tmp_path / "records", data, tokenizer, tokenizer_fingerprint="tiny")
    assert load_info(tmp_path / "records") == info
    encoded = examples_of(encode_conversations(tokenizer, "chat", read(path, "alpaca")))
    expected = sorted((t[:91], m[:91]) for t, m in encoded if any(m[1:91]))
    assert len({str(tokens) for tokens, _ in expected}) == len(expected)
    found = []
    for split in ("train", "held_out"):
        records = load_records(tmp_path / "records", split, verify=True)
        batch = records.rows(list(range(len(records))))
        for tokens, example, is_answer in zip(*batch.values(), strict=True):
            for number in range(1, example.max() + 1):
                chosen = example == number
                found.append((tokens[chosen].tolist(), is_answer[chosen].tolist()))
        counts = info.splits[split]
        assert counts.records == len(records)
        assert counts.documents == sum(int(e.max()) for e in batch["example"])
        assert (counts.documents == counts.records) == (not packing)
        assert counts.tokens == int((batch["example"] > 0).sum())
        same = batch["example"][:, 1:] == batch["example"][:, :-1]
        assert counts.predicted_tokens == int((batch["is_answer"][:, 1:] & same).sum())
    assert sorted(found) == expected
    truncated = sum(len(tokens) > 91 for tokens, mask in encoded if any(mask[1:91]))
    assert sum(split.truncated for split in info.splits.values()) == truncated > 0


def test_examples_without_an_answer_in_reach_are_counted(
    backend: tokenizers.Tokenizer, tmp_path: pathlib.Path
):
    rows = alpaca_rows(60)
    for row in rows[::10]:
        row["instruction"] *= 20
    tokenizer = make_tokenizer(backend, CHATML)
    data = make_config(write_jsonl(tmp_path / "a.jsonl", rows))
    info = prepare_records(tmp_path / "records", data, tokenizer, tokenizer_fingerprint="tiny")
    assert sum(split.dropped for split in info.splits.values()) == 6
    assert sum(split.documents for split in info.splits.values()) == 54
    data = make_config(pathlib.Path(data.train), sequence_length=8)
    with pytest.raises(UserError, match="an answer within data.sequence_length=8, [0-9]+ without"):
        prepare_records(tmp_path / "short", data, tokenizer, tokenizer_fingerprint="tiny")


def test_budget_ends_with_a_whole_example(backend: tokenizers.Tokenizer, tmp_path: pathlib.Path):
    tokenizer = make_tokenizer(backend, CHATML)
    path = write_jsonl(tmp_path / "a.jsonl", alpaca_rows(60))
    data = make_config(path, max_train_tokens=300)
    info = prepare_records(tmp_path / "records", data, tokenizer, tokenizer_fingerprint="tiny")
    assert 300 <= info.splits["train"].tokens < 300 + 65


def test_other_templates_are_refused(backend: tokenizers.Tokenizer, tmp_path: pathlib.Path):
    path = write_jsonl(tmp_path / "a.jsonl", alpaca_rows(60))
    directory = tmp_path / "records"
    first = make_tokenizer(backend, CHATML)
    prepare_records(directory, make_config(path), first, tokenizer_fingerprint="tiny")
    second = make_tokenizer(backend, LLAMA3)
    with pytest.raises(UserError, match="chat_template_sha256 .* -> "):
        prepare_records(directory, make_config(path), second, tokenizer_fingerprint="tiny")
    for field, value in (("template", "alpaca"), ("packing", False), ("format", "messages")):
        data = make_config(path, **{field: value})
        with pytest.raises(UserError, match=f"{field} .* -> .*another --workdir, or delete"):
            prepare_records(directory, data, first, tokenizer_fingerprint="tiny")


def test_settings_that_contradict_each_other(backend: tokenizers.Tokenizer, tmp_path: pathlib.Path):
    tokenizer = make_tokenizer(backend, CHATML)
    path = write_jsonl(tmp_path / "a.jsonl", alpaca_rows(3))
    for fields, message in (
        ({"format": "messages", "template": "alpaca"}, "data.template='alpaca'.*use chat"),
        ({"train": "docstrings:"}, "data.train='docstrings:'.*hold no instructions"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_records(
                tmp_path / "records",
                make_config(path, **fields),
                tokenizer,
                tokenizer_fingerprint="tiny",
            )


def test_workers_write_the_same_files(
    backend: tokenizers.Tokenizer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("opt_deus_jax.data.chunks._CHUNK_CHARACTERS", 100)
    monkeypatch.setattr("opt_deus_jax.data.chunks._MIN_PARALLEL_CHARACTERS", 300)
    tokenizer = make_tokenizer(backend, CHATML)
    path = write_jsonl(tmp_path / "a.jsonl", alpaca_rows(60))
    infos = [
        prepare_records(
            tmp_path / str(workers),
            make_config(path, num_workers=workers),
            tokenizer,
            tokenizer_fingerprint="tiny",
        )
        for workers in (1, 2)
    ]
    assert infos[0] == infos[1]
