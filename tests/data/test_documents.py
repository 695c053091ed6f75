import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from opt_deus_jax.data.documents import ENDINGS, Document, is_held_out, read_documents
from opt_deus_jax.data.sources import find_sources, fingerprint
from opt_deus_jax.errors import UserError

ROWS = [{"id": f"row{i}", "text": f"text {i} é\u2028\n" * 50} for i in range(20)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def write(path: Path, lines: bytes = LINES) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".xz":
        path.write_bytes(lzma.compress(lines))
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.compress(lines))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path.write_bytes(lines)
    return path


def read(*paths: Path, text_field: str = "text") -> list[Document]:
    sources = find_sources(",".join(map(str, paths)), ENDINGS)
    return [document for source in sources for document in read_documents(source, text_field)]


JSONL = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz"]


@pytest.mark.parametrize("name", [*JSONL, "a.parquet", "A.JSONL"])
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str):
    assert read(write(tmp_path / name)) == [Document(row["id"], row["text"]) for row in ROWS]


def test_folder_is_sorted_recursive_and_leaves_other_endings_out(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt").write_text("second")
    (tmp_path / "a.txt").write_text("\ufefffirst")
    (tmp_path / "readme.md").write_text("not text")
    assert read(tmp_path) == [Document("a.txt", "first"), Document("b/z.txt", "second")]


def test_sources_keep_their_order(tmp_path: Path):
    second, first = write(tmp_path / "a.txt", b"2"), write(tmp_path / "b.txt", b"1")
    assert [document.text for document in read(first, second)] == ["1", "2"]


def test_rows_without_text_are_left_out_and_lines_name_the_rest(tmp_path: Path):
    lines = b'{"text": null}\n\n{"text": "  "}\n{"text": "kept", "id": 7}\n{"text": "\\ud800"}'
    documents = read(write(tmp_path / "a.jsonl", lines))
    assert documents == [Document("a.jsonl:4", "kept"), Document("a.jsonl:5", "\ufffd")]


def test_zstandard_files_of_several_frames_are_read_whole(tmp_path: Path):
    path = tmp_path / "a.jsonl.zst"
    half = len(LINES) // 2
    path.write_bytes(zstandard.compress(LINES[:half]) + zstandard.compress(LINES[half:]))
    assert len(read(path)) == len(ROWS)


def test_reading_is_lazy(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\nbad\n')
    (source,) = find_sources(str(path), ENDINGS)
    assert next(read_documents(source, "text")).text == "good"


@pytest.mark.parametrize("name", [*JSONL[1:], "a.parquet"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_corrupt_file_is_named(tmp_path: Path, name: str, damage: str):
    path = write(tmp_path / name)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20] if damage == "cut" else b"garbage" * 20)
    with pytest.raises(UserError, match=rf"{name}: .*corrupt.*fetch it anew"):
        read(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"a.jsonl:2: not a line of JSON"),
        (b'{"text": "a"}\n\xff\xfe{"\n', r"a.jsonl:2: not a line of JSON"),
        (b"[1]\n", r"a.jsonl:1: holds no JSON object"),
        (
            b'{"content": "a", "n": 1}\n',
            r"a.jsonl:1: no field 'text', only 'content', 'n': .*text_",
        ),
        (b'{"text": 3}\n', r"a.jsonl:1: the text is of type int.*text_field"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, lines: bytes, message: str):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / "a.jsonl", lines))


def test_parquet_without_the_field_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="a.parquet: no field 'body', only 'id', 'text'"):
        read(write(tmp_path / "a.parquet"), text_field="body")


def test_paths_are_checked_before_anything_is_read(tmp_path: Path):
    good = write(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"absent.txt: no such file"):
        find_sources(f"{good},{tmp_path}/absent.txt", ENDINGS)


def test_unusable_sources(tmp_path: Path):
    with pytest.raises(UserError, match="no text is named"):
        find_sources(" , ", ENDINGS)
    with pytest.raises(UserError, match="a.csv: unknown kind of file: use .txt, "):
        read(write(tmp_path / "a.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no text files in this folder"):
        read(tmp_path / "empty")
    with pytest.raises(UserError, match="byte 1 is not UTF-8"):
        read(write(tmp_path / "a.txt", b"a\xff"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file_is_named(tmp_path: Path):
    path = write(tmp_path / "a.txt")
    path.chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        read(path)


def test_fingerprint_is_of_the_content(tmp_path: Path):
    path = write(tmp_path / "a.jsonl")
    (source,) = find_sources(str(path), ENDINGS)
    before = fingerprint(source)
    os.utime(path, (0, 0))
    assert fingerprint(source) == before
    path.write_bytes(LINES[:-2] + b" \n")
    assert fingerprint(source) != before
    path.unlink()
    with pytest.raises(UserError, match="a.jsonl: cannot be read"):
        fingerprint(source)


def test_split_takes_its_share_and_never_changes():
    names = [str(i) for i in range(4000)]
    held_out = [name for name in names if is_held_out(name, 0.05)]
    assert 140 < len(held_out) < 260
    assert held_out[:5] == ["19", "23", "32", "40", "53"]
    assert set(held_out) < {name for name in names if is_held_out(name, 0.1)}
