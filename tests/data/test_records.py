import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from opt_deus_jax.config import DataConfig
from opt_deus_jax.data import chunks, preparation
from opt_deus_jax.data.documents import ENDINGS, is_held_out, read_documents
from opt_deus_jax.data.preparation import prepare_records
from opt_deus_jax.data.records import Records, load_records
from opt_deus_jax.data.sources import find_sources
from opt_deus_jax.data.writers import TextWriter
from opt_deus_jax.errors import UserError

EOS = 256
LENGTH = 16


@dataclasses.dataclass(frozen=True)
class ByteEncoder:
    """UTF-8 bytes as tokens; module-level, so that spawned processes can unpickle it."""

    vocabulary_size: int = 257
    eos_ids: tuple[int, ...] = (EOS,)
    shift: int = 0

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[byte + self.shift for byte in text.encode()] for text in texts]


class DyingEncoder(ByteEncoder):
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if os.environ.get("TOKENIZERS_PARALLELISM") == "false":
            os._exit(1)
        return super().encode_batch(texts)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    texts = [f"document {i} " + "abc " * (i % 7) for i in range(300)]
    path.write_text(
        "".join(json.dumps({"id": str(i), "text": t}) + "\n" for i, t in enumerate(texts))
    )
    return path


def make_config(corpus: Path, **fields: object) -> DataConfig:
    defaults = {
        "train": str(corpus),
        "held_out_fraction": 0.2,
        "sequence_length": LENGTH,
        "max_held_out_tokens": 0,
        "num_workers": 1,
    }
    return DataConfig(**(defaults | fields))  # pyright: ignore[reportArgumentType]


def prepare(directory: Path, data: DataConfig, tokenizer: ByteEncoder | None = None):
    tokenizer = tokenizer or ByteEncoder()
    return prepare_records(directory, data, tokenizer, tokenizer_fingerprint="bytes")


def expected_tokens(corpus: Path, held_out: bool) -> list[int]:
    tokens: list[int] = []
    for document in read_documents(find_sources(str(corpus), ENDINGS)[0], "text"):
        if is_held_out(document.id, 0.2) == held_out:
            tokens += [*document.text.encode(), EOS]
    return tokens


def test_every_token_is_predicted_exactly_once(tmp_path: Path, corpus: Path):
    info = prepare(tmp_path / "records", make_config(corpus))
    for split, held_out in (("train", False), ("held_out", True)):
        loaded = load_records(tmp_path / "records", split, verify=True)
        tokens = expected_tokens(corpus, held_out)
        predicted = np.concatenate([loaded[i][1:] for i in range(len(loaded))])
        assert 0 <= len(tokens) - 1 - len(predicted) < LENGTH
        np.testing.assert_array_equal(predicted, tokens[1 : len(predicted) + 1])
        inputs = np.concatenate([loaded[i][:-1] for i in range(len(loaded))])
        np.testing.assert_array_equal(inputs, tokens[: len(predicted)])
        assert loaded[0].dtype == np.int32
        assert loaded[0].shape == (LENGTH + 1,)
        assert info.splits[split].tokens == len(predicted) == len(loaded) * LENGTH
    assert info.splits["train"].documents + info.splits["held_out"].documents == 300
    with pytest.raises(IndexError):
        loaded[len(loaded)]


def test_two_workers_write_the_same_files(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chunks, "_CHUNK_CHARACTERS", 100)
    monkeypatch.setattr(chunks, "_MIN_PARALLEL_CHARACTERS", 300)
    for max_train_tokens in (0, 30 * LENGTH):
        infos = []
        for num_workers in (1, 2):
            directory = tmp_path / f"{max_train_tokens}_{num_workers}"
            data = make_config(corpus, num_workers=num_workers, max_train_tokens=max_train_tokens)
            infos.append(prepare(directory, data))
        assert infos[0] == infos[1]
    assert infos[0].splits["train"].records == 30


def test_dead_worker(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunks, "_CHUNK_CHARACTERS", 100)
    monkeypatch.setattr(chunks, "_MIN_PARALLEL_CHARACTERS", 300)
    with pytest.raises(UserError, match="worker process died.*num_workers=1"):
        prepare(tmp_path / "records", make_config(corpus, num_workers=2), DyingEncoder())
    assert not list((tmp_path / "records").iterdir())


def test_limits_stop_the_reading(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunks, "_CHUNK_CHARACTERS", 100)
    with corpus.open("a") as file:
        file.write("this line is never reached")
    data = make_config(corpus, max_train_tokens=4 * LENGTH + 3, max_held_out_tokens=2 * LENGTH)
    info = prepare(tmp_path / "records", data)
    assert info.splits["train"].records == 4
    assert info.splits["held_out"].records == 2
    tokens = load_records(tmp_path / "records", "held_out").tokens
    np.testing.assert_array_equal(tokens, expected_tokens_prefix(corpus, 2 * LENGTH + 1, True))
    assert info.splits["held_out"].documents == 1 + np.sum(tokens[:-1] == EOS)
    tokens = load_records(tmp_path / "records", "train").tokens
    np.testing.assert_array_equal(tokens, expected_tokens_prefix(corpus, 4 * LENGTH + 1, False))


def expected_tokens_prefix(corpus: Path, count: int, held_out: bool) -> list[int]:
    tokens: list[int] = []
    for document in read_documents(find_sources(str(corpus), ENDINGS)[0], "text"):
        if is_held_out(document.id, 0.2) == held_out:
            tokens += [*document.text.encode(), EOS]
        if len(tokens) >= count:
            break
    return tokens[:count]


def test_held_out_text_of_its_own(tmp_path: Path, corpus: Path):
    other = tmp_path / "other.txt"
    other.write_text("held out " * 20)
    data = make_config(corpus, held_out=str(other), max_train_tokens=2 * LENGTH)
    info = prepare(tmp_path / "records", data)
    assert bytes(load_records(tmp_path / "records", "held_out").tokens[:8].tolist()) == b"held out"
    assert info.splits["held_out"].documents == 1
    assert "held_out_fraction" not in info.settings


@pytest.mark.parametrize(("vocabulary", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_highest_token_survives(tmp_path: Path, corpus: Path, vocabulary: int, dtype: str):
    encoder = ByteEncoder(vocabulary, eos_ids=(vocabulary - 1,))
    info = prepare(tmp_path / "records", make_config(corpus), encoder)
    assert info.dtype == dtype
    assert load_records(tmp_path / "records", "train").tokens.max() == vocabulary - 1


def test_second_run_does_nothing(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch):
    data = make_config(corpus)
    info = prepare(tmp_path / "records", data)
    monkeypatch.setattr(preparation, "encode_chunks", None)
    data.num_workers, data.seed = 2, 5
    assert prepare(tmp_path / "records", data) == info


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sequence_length", 8),
        ("text_field", "body"),
        ("max_train_tokens", 64),
        ("held_out", "a.txt"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, corpus: Path, field: str, value: object):
    prepare(tmp_path / "records", make_config(corpus))
    with pytest.raises(UserError, match=rf"{field} .* -> .*another --workdir, or delete"):
        prepare(tmp_path / "records", make_config(corpus, **{field: value}))


def test_text_that_has_changed_is_refused(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chunks, "_CHUNK_CHARACTERS", 100)
    unread = tmp_path / "unread.txt"
    unread.write_text("not reached")
    data = make_config(corpus, max_train_tokens=64, max_held_out_tokens=16)
    data.train = f"{corpus},{unread}"
    info = prepare(tmp_path / "records", data)
    assert [name for name, _ in info.sources["train"]] == ["corpus.jsonl", "unread.txt"]
    assert info.sources["train"][1][1] is None
    os.utime(corpus, (0, 0))
    unread.write_text("changed, but never read")
    assert prepare(tmp_path / "records", data) == info
    whole = corpus.read_bytes()
    corpus.write_bytes(whole.replace(b"document 7 ", b"document 8 "))
    with pytest.raises(UserError, match="corpus.jsonl: has changed since .*another --workdir"):
        prepare(tmp_path / "records", data)
    corpus.write_bytes(whole)
    prepare(tmp_path / "records", data)
    unread.rename(tmp_path / "renamed.txt")
    data.train = f"{corpus},{tmp_path}/renamed.txt"
    with pytest.raises(UserError, match="train .*renamed.txt"):
        prepare(tmp_path / "records", data)


def test_file_added_to_the_folder_is_noticed(tmp_path: Path, corpus: Path):
    folder = tmp_path / "texts"
    folder.mkdir()
    corpus = corpus.rename(folder / corpus.name)
    prepare(tmp_path / "records", make_config(folder))
    (folder / "more.txt").write_text("more")
    with pytest.raises(UserError, match="data.train named 1 files .* names 2 or others now"):
        prepare(tmp_path / "records", make_config(folder))


def test_another_tokenizer_is_refused(tmp_path: Path, corpus: Path):
    prepare(tmp_path / "records", make_config(corpus))
    with pytest.raises(UserError, match="tokenizer_sha256"):
        prepare_records(
            tmp_path / "records", make_config(corpus), ByteEncoder(), tokenizer_fingerprint="other"
        )


@pytest.mark.parametrize("stage", ["append", "finish", "publish", "_write_info"])
def test_interrupted_write_leaves_nothing_that_looks_whole(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, stage: str
):
    def interrupt(*_: object):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparation if stage == "_write_info" else TextWriter, stage, interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "records", make_config(corpus))
    assert not list((tmp_path / "records").glob("*.tmp"))
    with pytest.raises(UserError, match="no records here"):
        load_records(tmp_path / "records", "train")
    prepare(tmp_path / "records", make_config(corpus))
    assert len(load_records(tmp_path / "records", "train", verify=True))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk(tmp_path: Path, corpus: Path):
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "train.bin.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="disk is full.*2 bytes a token"):
        prepare(tmp_path / "records", make_config(corpus))
    assert not list((tmp_path / "records").iterdir())


def test_folder_that_cannot_be_made(tmp_path: Path, corpus: Path):
    with pytest.raises(UserError, match="cannot be written"):
        prepare(corpus / "records", make_config(corpus))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequence_length": 0}, "data.sequence_length=0"),
        ({"num_workers": -1}, "data.num_workers=-1"),
        ({"max_train_tokens": 5}, "data.max_train_tokens=5: fewer than the 16"),
        ({"held_out_fraction": 0.0}, "data.held_out_fraction=0.0"),
        ({"held_out_fraction": 1.0}, "data.held_out_fraction=1.0"),
        (
            {"sequence_length": 5000},
            "data.held_out: [0-9]+ documents with .* one record needs 5001",
        ),
        ({"held_out_fraction": 1e-9}, "data.held_out: 0 documents with 0 tokens"),
    ],
)
def test_unusable_settings(tmp_path: Path, corpus: Path, fields: dict, message: str):
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "records", make_config(corpus, **fields))


def test_held_out_text_that_is_the_training_text(tmp_path: Path, corpus: Path):
    with pytest.raises(UserError, match="data.held_out=.*is the training text"):
        prepare(tmp_path / "records", make_config(corpus, held_out=str(corpus)))


def test_empty_corpus(tmp_path: Path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="data.train: 0 documents with 0 tokens"):
        prepare(tmp_path / "records", make_config(tmp_path / "empty.jsonl"))


def test_token_outside_the_vocabulary(tmp_path: Path, corpus: Path):
    with pytest.raises(UserError, match="gives token 256, but the vocabulary has 200"):
        prepare_records(
            tmp_path / "records",
            make_config(corpus),
            ByteEncoder(),
            tokenizer_fingerprint="bytes",
            vocabulary_size=200,
        )


def test_damaged_files_are_noticed(tmp_path: Path, corpus: Path):
    directory = tmp_path / "records"
    prepare(directory, make_config(corpus))
    path = directory / "train.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2] + b"xx")
    load_records(directory, "train")
    with pytest.raises(UserError, match="sha256"):
        load_records(directory, "train", verify=True)
    path.write_bytes(whole[:-2])
    with pytest.raises(UserError, match="train.bin: [0-9]+ bytes where [0-9]+ were written"):
        prepare(directory, make_config(corpus))
    path.unlink()
    with pytest.raises(UserError, match="train.bin: no such records"):
        load_records(directory, "train")
    (directory / "records.json").write_text('{"settings": {}}')
    with pytest.raises(UserError, match="not a list of records of this version: delete"):
        load_records(directory, "train")


def test_records_of_too_few_tokens_are_none():
    assert len(Records(np.zeros(0, np.uint16), 4)) == 0
    assert len(Records(np.zeros(4, np.uint16), 4)) == 0
    assert len(Records(np.zeros(5, np.uint16), 4)) == 1


def test_rows_are_the_records_in_the_order_asked_for():
    loaded = Records(np.arange(13, dtype=np.uint16), 4)
    rows = loaded.rows([2, 0, 2])["tokens"]
    np.testing.assert_array_equal(rows, [range(8, 13), range(5), range(8, 13)])
    assert rows.dtype == np.int32
    assert loaded.rows([])["tokens"].shape == (0, 5)
    for number in (-1, 3):
        with pytest.raises(IndexError, match="of 3"):
            loaded.rows([0, number])
