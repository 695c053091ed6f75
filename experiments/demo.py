r"""Grows SmolLM2-135M by seven layers on this machine, in some minutes: `make demo`.

python -m experiments.demo --workdir=runs/demo
Runs the launchers one after another and shows each command.
"""

import shlex
import subprocess
import sys
from pathlib import Path

from absl import flags

from configs.smollm2_135m import smollm2_base
from opt_deus_jax import launch
from opt_deus_jax.errors import UserError
from opt_deus_jax.reporting.tables import show

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the demo.", required=True)
_OVERRIDES = flags.DEFINE_multi_string(
    "set", [], "Passed on to each launcher, as in --set=--config.training.steps=10."
)
_CONFIG = "configs/smollm2_135m.py:demo"
_BASE = "--config.base="
_PROMPT = "Returns the eigenvalues of"


def _run(launcher: str, *arguments: str) -> None:
    command = [sys.executable, "-m", f"experiments.{launcher}", *arguments]
    show(f"\n$ python -m experiments.{launcher} {shlex.join(arguments)}")
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"experiments.{launcher} failed, see above; mend it and run the demo again")


def main() -> None:
    """Plans, expands, prepares text, trains, exports and samples."""
    workdir = _WORKDIR.value
    exported = Path(workdir) / "exported"
    config, where = f"--config={_CONFIG}", f"--workdir={workdir}"
    given = [o.removeprefix(_BASE) for o in _OVERRIDES.value if o.startswith(_BASE)]
    *_, base = smollm2_base(), *given
    _run("plan", config, *_OVERRIDES.value)
    for launcher in ("expand", "prepare_data", "train"):
        _run(launcher, config, where, *_OVERRIDES.value)
    if not exported.exists():
        _run("export", config, where, *_OVERRIDES.value)
    _run("sample", f"--model={base}", f"--model={exported}", f"--prompt={_PROMPT}")
    show(
        f"\nEverything lies in {workdir}:",
        "  expanded/diagnostics.png  transport of the new layers",
        "  loss.png                  losses; metrics.jsonl and tensorboard/ hold the figures",
        f"  exported/                 the trained model: AutoModelForCausalLM"
        f".from_pretrained('{exported}')",
        "Next: another method or place for the new layers, in a work directory of its own:",
        f"  python -m experiments.expand {config} --workdir=runs/other "
        "--config.upscale.method=copy_next --config.upscale.layout=middle",
    )


if __name__ == "__main__":
    launch.run(main)
