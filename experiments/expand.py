r"""Grows a base checkpoint and proves what the grown model computes.

python -m experiments.expand --config=configs/smollm2_135m.py --workdir=runs/first
Writes WORKDIR/expanded: a Hugging Face folder with its manifest and a picture of the transport.
Killed at any moment and started again, it goes on, and ends in the same bytes. Started once in each
of several processes (--coordinator), these share the files: WORKDIR is one folder that all see.
"""

from typing import Any

import tqdm
from absl import flags

from opt_deus_jax import launch
from opt_deus_jax.checkpoints.journal import is_finished
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.config import Experiment
from opt_deus_jax.distributed import processes
from opt_deus_jax.distributed.team import Team, whole_program
from opt_deus_jax.reporting.plots import PICTURE, plot_diagnostics
from opt_deus_jax.reporting.tables import expansion_report, show
from opt_deus_jax.training.segments import select_trained
from opt_deus_jax.upscaling.expand import expand_checkpoint
from opt_deus_jax.upscaling.forecast import check_memory, forecast_line, forecast_plan
from opt_deus_jax.upscaling.grown_tensors import grown_config, plan_expansion
from opt_deus_jax.upscaling.lookahead import fusing_devices
from opt_deus_jax.upscaling.probe import probe_tokens

_GAPS = flags.DEFINE_integer(
    "gaps_at_once", 0, "Gaps that a process fuses at once, each on a device; 0: all accelerators."
)
launch.define_flags(others=(_GAPS.name, *processes.key_flags()))


def prepare(experiment: Experiment, team: Team, processes_here: int, tell: Any) -> tuple[Any, ...]:
    """Opens the base, chooses devices, and refuses what cannot be made here, or trained."""
    devices = fusing_devices(_GAPS.value)
    source = open_checkpoint(experiment.base)
    plan = plan_expansion(source, experiment.upscale)
    # What cannot be trained is better known before the work than after it.
    select_trained(grown_config(source, plan), plan.is_new, plan.method.trained)
    expected = forecast_plan(source, plan, gaps_at_once=len(devices), processes=team.count)
    tell(forecast_line(expected, experiment.max_shard_bytes))
    check_memory(expected, experiment.upscale, processes_here)
    return source, devices, probe_tokens(source), len(plan.layers)


def main() -> None:
    """Expands, proves, reports."""
    processes.start_processes()
    team = whole_program()
    first = team.is_first
    tell = show if first else lambda *items: None
    experiment, workdir = team.run(lambda: launch.start(("base", "upscale"), is_writer=first))
    directory = workdir / "expanded"
    if team.gather(is_finished(directory))[0]:
        tell(f"{directory} exists and was made with this config; nothing to do")
        return
    here = team.count_here()
    source, devices, probe_BT, depth = team.run(lambda: prepare(experiment, team, here, tell))
    total = depth if team.count == 1 else None
    with tqdm.tqdm(total=total, desc="expand", unit=" layers", disable=not first) as bar:
        expansion = expand_checkpoint(
            source,
            experiment.upscale,
            directory,
            probe_BT=probe_BT,
            max_shard_bytes=experiment.max_shard_bytes,
            devices=devices,
            team=team,
            on_layer=lambda origin: bar.update(),
            draw=plot_diagnostics,
            say=tqdm.tqdm.write,
        )
    tell(*expansion_report(expansion, directory / PICTURE))


if __name__ == "__main__":
    launch.run(main)
