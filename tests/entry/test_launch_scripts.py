"""The scripts that start pods: their syntax, the flags they use, and how arguments arrive."""

import functools
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.entry.launching import launch

_ROOT = Path(__file__).parents[2]
_SCRIPTS = sorted((_ROOT / "experiments" / "launch").glob("*.sh"))
_SETTINGS = {
    name: "x"
    for name in (
        *("CONFIG", "WORKDIR", "HOST", "TPU_NAME", "ZONE", "CLUSTER", "PROJECT", "WORKLOAD"),
        *("TPU_TYPE", "IMAGE", "STORAGE", "SLURM_SUBMIT_DIR"),
    )
}


def _run(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script), *arguments],
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def _code(script: Path) -> str:
    return "\n".join(
        line for line in script.read_text().splitlines() if not line.lstrip().startswith("#")
    )


def test_there_are_scripts_for_every_kind_of_machine() -> None:
    names = {script.name for script in _SCRIPTS}
    assert {"single_box.sh", "slurm_gpu.sh", "tpu_vm.sh", "xpk.sh"} <= names
    described = (_ROOT / "BUILD.md").read_text()
    assert all(f"experiments/launch/{name}" in described for name in names)


@pytest.mark.parametrize("script", _SCRIPTS, ids=lambda script: script.name)
def test_bash_can_read_it(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", _SCRIPTS, ids=lambda script: script.name)
def test_a_setting_that_is_missing_is_named(script: Path) -> None:
    needed = re.findall(r"^: \"\$\{(\w+):\?", script.read_text(), re.MULTILINE)
    assert "CONFIG" in needed
    for name in needed:
        settings = {key: value for key, value in _SETTINGS.items() if key != name}
        result = _run(script, **settings)
        assert result.returncode != 0
        assert f"{name}: set {name} to" in result.stderr


@functools.cache
def _help(module: str) -> str:
    return launch(module, "--help").stdout


@pytest.mark.parametrize("script", _SCRIPTS, ids=lambda script: script.name)
def test_the_modules_and_flags_it_uses_exist(script: Path) -> None:
    code = _code(script)
    modules = set(re.findall(r"\bexperiments\.(\w+)", code))
    others = set(re.findall(r"experiments/launch/(\w+\.sh)", code))
    assert modules or others
    assert others <= {other.name for other in _SCRIPTS}
    assert all("--workdir" in _help(module) for module in modules)
    if "--coordinator" in code:
        assert all("--coordinator" in _help(module) for module in ("expand", "train"))


@pytest.mark.parametrize(
    ("name", "tool"), [("tpu_vm.sh", "gcloud"), ("xpk.sh", "xpk")], ids=("tpu_vm", "xpk")
)
@pytest.mark.parametrize("arguments", [(), ("--config.data.train=/a b/c", "--config.base=it's")])
def test_what_the_tool_is_given_reaches_the_host_unchanged(
    name: str, tool: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    # In place of the cloud's tool stands one that writes down the command that hosts would run.
    written = tmp_path / "command"
    (tmp_path / tool).write_text(
        '#!/bin/sh\nfor last; do :; done\nprintf %s "${last#--command=}" > ' + str(written) + "\n"
    )
    (tmp_path / tool).chmod(0o755)
    settings = _SETTINGS | {"CONFIG": "configs/llama3.py:8b", "WORKDIR": "/shared/two words"}
    script = _ROOT / "experiments" / "launch" / name
    settings["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    result = _run(script, *arguments, **settings)
    assert result.returncode == 0, result.stderr
    words = shlex.split(written.read_text())
    assert "CONFIG=configs/llama3.py:8b" in words
    assert "WORKDIR=/shared/two words" in words
    assert "EXPAND_PLATFORMS=cpu" in words
    start = words.index("experiments/launch/every_host.sh")
    assert tuple(words[start + 1 :]) == arguments
