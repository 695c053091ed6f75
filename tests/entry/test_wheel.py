"""The wheel: built as a release is, installed alone, typed."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from tests.entry.launching import ROOT, environment


def run(*command: object, cwd: Path = ROOT) -> str:
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_wheel_is_built_and_holds_the_library(tmp_path: Path) -> None:
    # Of a copy: setuptools leaves what it builds in the source, and takes it up the next time.
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "opt_deus_jax", source / "opt_deus_jax", ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run("-m", "build", "--wheel", "--outdir", tmp_path, source)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"opt_deus_jax-{version}-py3-none-any.whl"
    assert (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1].startswith(version)
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.startswith("opt_deus_jax/")}
    modules = (ROOT / "opt_deus_jax").rglob("*.py")
    assert inside == {str(path.relative_to(ROOT)) for path in modules} | {"opt_deus_jax/py.typed"}
    installed = tmp_path / "installed"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", installed, wheel)
    script = "import opt_deus_jax.training.loop as loop; print(loop.__file__)"
    assert run("-c", script, cwd=installed).startswith(str(installed))
