import re
import subprocess
import sys
from pathlib import Path

import pytest

from opt_deus_jax.data.docstrings import STANDARD_LIBRARY, read_docstrings
from opt_deus_jax.data.documents import is_held_out
from opt_deus_jax.errors import UserError


@pytest.fixture(scope="module")
def corpus() -> dict[str, str]:
    pairs = list(read_docstrings((STANDARD_LIBRARY, "numpy")))
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def sections(text: str) -> dict[str, str]:
    parts = (part.split("\n\n", 1) for part in re.split(r"\n\n\n(?=[\w.]+\n\n)", text))
    return {part[0]: part[1] for part in parts if len(part) == 2}


def test_corpus_is_large_and_readable(corpus: dict[str, str]):
    assert sum(map(len, corpus.values())) > 1_000_000
    linalg = sections(corpus["numpy.linalg._linalg"])
    solve = linalg["numpy.linalg._linalg.solve"]
    assert solve.startswith("Solve a linear matrix equation")
    assert "\nParameters\n----------\n" in solve
    assert "json" in corpus
    assert "json.encoder.JSONEncoder.default" in sections(corpus["json.encoder"])


def test_splits_share_no_docstring(corpus: dict[str, str]):
    train, held_out = set(), set()
    for name, text in corpus.items():
        side = held_out if is_held_out(name, 0.1) else train
        side |= {" ".join(part.split()) for part in sections(text).values()}
    assert len(held_out) > 100
    assert not train & held_out


def test_tests_and_copies_of_other_projects_are_left_out(corpus: dict[str, str]):
    bad = re.compile(r"(^|\.)(tests?|_vendor|site-packages|idlelib|test_\w*)(\.|$)")
    assert not [name for name in corpus if bad.search(name)]


def test_first_modules_are_a_sample_of_all_packages(corpus: dict[str, str]):
    first = [name.startswith("numpy.") for name in list(corpus)[:40]]
    assert 3 < sum(first) < 37


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "made_up_package"
    folder.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_near_duplicates_are_dropped(package: Path):
    paragraphs = "\n\n".join(f"Paragraph {i} that says something. " * 8 for i in range(3))
    (package / "__init__.py").write_text(f'"""{paragraphs}"""\nraise RuntimeError("imported")')
    (package / "copy.py").write_text(f'"""{paragraphs}\n\nOne more line."""')
    (package / "short.py").write_text('"""Short."""')
    (package / "broken.py").write_text('"""Broken."""\ndef')
    documents = list(read_docstrings(("made_up_package",)))
    assert len(documents) == 1
    assert "Paragraph 2" in documents[0][1]


def test_source_is_not_imported_and_absent_packages_are_left_out(package: Path):
    text = "A sentence of a docstring, of which there are many. " * 8
    (package / "__init__.py").write_text(
        f'raise RuntimeError("imported")\ndef f():\n  """{text}"""'
    )
    # Files that Python 3.12 warns about must not stop a run under `-W error`.
    (package / "escape.py").write_text(f'"""Other. {text}"""\nx = "\\d"')
    pairs = read_docstrings(("made_up_package", "no_such_package_anywhere"))
    assert sorted(name for name, _ in pairs) == ["made_up_package", "made_up_package.escape"]


def test_nothing_installed():
    with pytest.raises(UserError, match="no Python source of no_such_package_anywhere"):
        next(read_docstrings(("no_such_package_anywhere",)))


def test_reading_documents_loads_no_accelerator_library():
    code = (
        "import opt_deus_jax.data.preparation, sys; assert not {'jax', 'grain'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
