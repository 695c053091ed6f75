"""The notebooks: paired with scripts, without outputs, and run from top to bottom."""

import base64
import importlib.util
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import nbformat
import pytest

from tests.entry.launching import ROOT
from tests.llama_checkpoints import smollm2

_FOLDER = ROOT / "experiments" / "colab"
_SCRIPTS = sorted(_FOLDER.glob("*.py"))


def _read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def _executed(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **settings: str) -> Any:
    """The notebook after a run in a new kernel, in the folder in which Jupyter would start it."""
    settings |= {"OPT_DEUS_SMOKE": "1", "TMPDIR": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    settings["IPYTHONDIR"] = str(tmp_path / "ipython")
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    notebook = _read(_FOLDER / f"{name}.ipynb")
    nbclient.NotebookClient(
        notebook,
        timeout=600,
        resources={"metadata": {"path": str(_FOLDER)}},
    ).execute()
    return notebook


def _outputs(notebook: Any) -> list[Any]:
    return [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]


def _text(notebook: Any) -> str:
    outputs = _outputs(notebook)
    parts = [o.text if o.output_type == "stream" else o.data.get("text/plain", "") for o in outputs]
    return " ".join("\n".join(parts).split())


def _pictures(notebook: Any) -> list[bytes]:
    data = [output.data for output in _outputs(notebook) if "data" in output]
    return [base64.b64decode(found["image/png"]) for found in data if "image/png" in found]


def test_every_notebook_has_its_script():
    assert [path.stem for path in _SCRIPTS] == [
        "01_grow_a_model",
        "02_compare_initialisations",
        "03_pod_scale",
    ]
    assert sorted(path.stem for path in _FOLDER.glob("*.ipynb")) == [p.stem for p in _SCRIPTS]


@pytest.mark.parametrize("script", _SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_is_its_script_and_holds_no_outputs(script: Path):
    notebook, paired = _read(script.with_suffix(".ipynb")), jupytext.read(script)
    nbformat.validate(notebook)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [
        (c.cell_type, c.source) for c in paired.cells
    ]
    assert _outputs(notebook) == []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is None for cell in code)
    assert not any("matplotlib" in cell.source for cell in code)


def test_a_model_is_grown_trained_and_read_by_transformers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    smollm2()
    notebook = _executed("01_grow_a_model", monkeypatch, tmp_path)
    text = _text(notebook)
    assert "2 -> 3 layers" in text
    assert "the grown model gives the base's logits bit for bit" in text
    # Transport before and after sorting, diagnostics, losses of the grown model, and of both.
    assert len(_pictures(notebook)) == 4
    # Without transformers' progress bar, which comes between the two.
    printed = [o.text for o in _outputs(notebook) if o.get("name") == "stdout"]
    after = " ".join(" ".join(printed).split()).partition("after: ")[2].partition(" transformers: ")
    assert after[0]
    assert after[0] == after[2]


def test_two_contenders_are_compared_and_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    smollm2()
    settings = {"OPT_DEUS_RESULTS": str(tmp_path / "none")}
    notebook = _executed("02_compare_initialisations", monkeypatch, tmp_path, **settings)
    text = _text(notebook)
    assert "0 finished trainings of 0 contenders" in text
    assert "No table below has rows yet" in text
    assert "Differences to copy_next, over seeds that both have" in text
    assert "no rows yet: step times by place of the new layers" in text
    assert {path.name for path in tmp_path.glob("compared_*/results/*.json")} == {
        f"{method}_{run}.json"
        for method in ("copy_next", "opt_deus")
        for run in ("sweep_0.0005", "seed0")
    }
    # Curves, final losses, differences; one learning rate each is nothing to draw.
    assert len(_pictures(notebook)) == 3


@pytest.mark.parametrize("target", ["local", "v5e:2x2"])
def test_a_step_is_compiled_for_a_pod(target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    if target != "local" and importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu")
    notebook = _executed("03_pod_scale", monkeypatch, tmp_path, OPT_DEUS_TARGET=target)
    text, pictures = _text(notebook), _pictures(notebook)
    assert "memory: total" in text
    assert "CONFIG=configs/llama3.py:1b_v5e" in text
    if target == "local":
        assert "8 devices of local" in text
        assert "no chip, so neither limits nor least times" in text
        assert "xpk.sh" not in text
        assert len(pictures) == 2
    else:
        assert "model FLOPs utilisation, at most" in text
        assert "TPU_TYPE=v5litepod-4" in text
        assert len(pictures) == 3
