"""Every command that the documentation shows is one that its launcher takes."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from tests.entry.launching import ROOT, succeed
from tests.entry.parse_commands import problem_of

_PAGES = [*ROOT.glob("*.md"), ROOT / "experiments" / "results" / "README.md"]
_MODULES = [*ROOT.glob("configs/*.py"), *ROOT.glob("experiments/*.py")]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(launcher, arguments) of every command in some lines; arrays like "${C[@]}" are filled in."""
    text = text.replace("\\\n", " ")
    arrays = {
        name: " ".join(value.split()) for name, value in re.findall(r"\b([A-Z])=\(([^)]*)\)", text)
    }
    found = []
    for launcher, rest in re.findall(r"python -m experiments\.(\w+)([^\n]*)", text):
        for name, value in arrays.items():
            rest = rest.replace(f'"${{{name}[@]}}"', value)
        words = shlex.split(re.split(r"[|;]|&&| #", rest)[0])
        found.append((launcher, words))
    return found


def code_of_page(page: Path) -> str:
    """The blocks and spans of a page; a span that is broken over lines becomes one."""
    text = page.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return "\n".join([*blocks, *(" ".join(span.split()) for span in spans)])


def documented() -> list[tuple[str, str, list[str]]]:
    """(where, launcher, arguments), each command once."""
    texts = {page: code_of_page(page) for page in _PAGES}
    for module in _MODULES:
        texts[module] = ast.get_docstring(ast.parse(module.read_text())) or ""
    found = {}
    for path, text in texts.items():
        for launcher, arguments in commands(text):
            found.setdefault((launcher, *arguments), path.name)
    return [(where, launcher, arguments) for (launcher, *arguments), where in found.items()]


def test_every_documented_command_is_taken_by_its_launcher() -> None:
    shown = documented()
    assert len(shown) > 25
    broken = ("", "plan", ["--config=configs/smollm2_135m.py", "--config.upscale.depth=3"])
    unknown = ("", "train", ["--config=...", "--workdr=..."])
    *problems, of_broken, of_unknown = (
        problem_of(launcher, arguments) for _, launcher, arguments in [*shown, broken, unknown]
    )
    assert of_broken
    assert of_unknown
    assert "depth" in of_broken
    assert "--workdr" in of_unknown
    refused = [
        f"{where}: experiments.{launcher} {shlex.join(arguments)}\n{problem}"
        for (where, launcher, arguments), problem in zip(shown, problems, strict=True)
        if problem
    ]
    assert not refused, "\n".join(refused)


def test_documented_plans_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "pictures"
    folder.mkdir()
    plans = [arguments for _, launcher, arguments in documented() if launcher == "plan"]
    assert plans
    for arguments in plans:
        # Launchers run in the checkout, which no test may litter.
        here = [a.replace("--picture=", "--picture=~/pictures/") for a in arguments]
        assert "parameters" in succeed("plan", *here)
    assert [path.name for path in folder.iterdir()] == ["method.png"]


def test_documented_extras_and_targets_exist() -> None:
    text = "\n".join(page.read_text() for page in _PAGES)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(re.findall(r"\.\[(\w+)\]", text))
    assert extras
    assert extras <= set(project["optional-dependencies"])
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE))
    assert {"demo", "test", "lint"} <= named <= targets
