import json
import pathlib

import pyarrow as pa
import pyarrow.parquet
import pytest

from opt_deus_jax.data.instructions import (
    Turn,
)
from opt_deus_jax.errors import UserError
from tests.data.tiny_instructions import (
    alpaca_rows,
    read,
    write_jsonl,
)

U, A = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


def test_chat_template_of_alpaca_rows(tmp_path: pathlib.Path):
    path = write_jsonl(tmp_path / "a.jsonl", alpaca_rows(2))
    turns = [conversation.turns for conversation in read(path, "alpaca")]
    assert turns[0] == (Turn("user", "Say 0. \n\nsome text"), Turn("assistant", "0 it is"))
    assert turns[1] == (Turn("user", "Say 1. a b "), Turn("assistant", "1 it is1 it is"))


def test_every_kind_of_file_gives_the_same(tmp_path: pathlib.Path):
    rows = alpaca_rows(5)
    expected = read(write_jsonl(tmp_path / "a.jsonl", rows), "alpaca")
    write_jsonl(tmp_path / "b.jsonl.gz", rows)
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=1))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("b.jsonl.gz", "c.json", "d.parquet"):
        found = read(tmp_path / name, "alpaca")
        assert [c.turns for c in found] == [c.turns for c in expected]
        assert [c.id for c in found] == [c.id for c in expected]


def test_sharegpt_spelling_and_parquet_messages(tmp_path: pathlib.Path):
    turns = [Turn("system", "s"), Turn("user", "u"), Turn("assistant", "a")]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [
            {"messages": [turn._asdict() for turn in turns]},
            {"conversations": [{"from": names[t.role], "value": t.content} for t in turns]},
        ],
    )
    assert [c.turns for c in read(path, "messages")] == [tuple(turns)] * 2
    table = pa.Table.from_pylist([{"messages": [turn._asdict() for turn in turns]}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", "messages")[0].turns == tuple(turns)


@pytest.mark.parametrize(
    ("row_format", "row", "message"),
    [
        ("alpaca", {"instruction": "i"}, "no field output, there are only 'instruction'"),
        ("alpaca", {"instruction": "i", "output": " "}, "field output is empty: mend or drop"),
        ("alpaca", {"instruction": "", "output": "o"}, "field instruction is empty"),
        ("alpaca", {"instruction": "i", "output": 3}, "field output is 3, no text"),
        ("alpaca", {"instruction": "i", "input": 0, "output": "o"}, "field input is 0, no text"),
        ("alpaca", {"messages": [U, A]}, "data.format=messages"),
        ("messages", {"instruction": "i", "output": "o"}, "data.format=alpaca"),
        ("messages", {"text": "t"}, "'messages' is not a list of messages but None.*'text'"),
        ("messages", {"messages": []}, r"'messages' is not a list of messages but \[\]"),
        ("messages", {"messages": "hi"}, "'messages' is not a list of messages but 'hi'"),
        ("messages", {"messages": ["hi", "there"]}, "message 1 is no object"),
        ("messages", {"messages": [U]}, "the last message is by the user"),
        ("messages", {"messages": [A]}, "the first message is by the assistant"),
        ("messages", {"messages": [U, {"role": "assistant"}]}, r"no field messages\[1\].content"),
        (
            "messages",
            {"messages": [U, {"role": "tool", "content": "c"}, A]},
            r"field messages\[1\].role='tool': unknown role, use one of system, user, assistant",
        ),
        (
            "messages",
            {"messages": [U, {"role": "assistant", "content": [{"type": "text"}]}]},
            r"field messages\[1\].content is .*, no text",
        ),
        (
            "messages",
            {"conversations": [{"from": "user", "value": "v"}]},
            "from='user': unknown role, use one of system, human, gpt",
        ),
    ],
)
def test_bad_row_is_named(tmp_path: pathlib.Path, row_format: str, row: dict, message: str):
    good = {"instruction": "i", "output": "o"} if row_format == "alpaca" else {"messages": [U, A]}
    path = write_jsonl(tmp_path / "a.jsonl", [good, row])
    with pytest.raises(UserError, match=f"a.jsonl:2: .*{message}"):
        read(path, row_format)
    (tmp_path / "a.json").write_text(json.dumps([good, row]))
    with pytest.raises(UserError, match=f"a.json: row 2: .*{message}"):
        read(tmp_path / "a.json", row_format)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "a.json: not JSON"),
        ('{"instruction": "i"}', "a.json: holds no JSON list"),
        ("[3]", "a.json: row 1: holds no JSON object"),
        ('{"a": 1}\n{"a": 2}\n', r"a.json: not JSON .*one object a line must end in .jsonl"),
    ],
)
def test_bad_json_is_named(tmp_path: pathlib.Path, content: str, message: str):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.json", "alpaca")
