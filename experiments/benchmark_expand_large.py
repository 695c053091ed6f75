r"""Expands a checkpoint of random weights that is larger than memory may be, killed on the way.

python -m experiments.benchmark_expand_large --config=configs/llama3.py:8b_shape --workdir=runs/8b
Writes the base (16 GB for 8b_shape, from its config.json), grows it in a process that is killed
--kills times and started again, holds every tensor against the base, and times the transport of one
gap against a floor: its products and the passes of its iterations over one table, at the speed of
this machine. --layers and --gaps make it shorter. All weights are removed at the end.
"""

import shutil
import sys

from absl import flags

from opt_deus_jax import launch
from opt_deus_jax.checkpoints.manifest import software_versions
from opt_deus_jax.checkpoints.opening import open_checkpoint, read_config_only
from opt_deus_jax.models.params import named_tensors
from opt_deus_jax.reporting.large_expansion import (
    check_grown,
    expand_with_kills,
    time_matrices,
    write_random_checkpoint,
)
from opt_deus_jax.reporting.machine import machine
from opt_deus_jax.reporting.tables import records_table, show
from opt_deus_jax.upscaling.forecast import measure_speed
from opt_deus_jax.whole_files import write_json

launch.define_flags()
_LAYERS = flags.DEFINE_integer("layers", None, "Depth of the base; as in its config.json.")
_GAPS = flags.DEFINE_integer("gaps", None, "New layers; as in the config.", lower_bound=1)
_KILLS = flags.DEFINE_integer("kills", 2, "How often the expansion is killed.", lower_bound=0)


def main() -> None:
    """Makes, grows, kills, checks, times, removes."""
    experiment, workdir = launch.start(("base",))
    hf_config, model = read_config_only(experiment.base)
    depth = _LAYERS.value or model.num_layers
    gaps = _GAPS.value or experiment.upscale.num_new_layers
    base, run = workdir / "base", workdir / "run"
    for leftover in (base, run):
        shutil.rmtree(leftover, ignore_errors=True)
    command = [sys.executable, "-m", "experiments.expand", f"--workdir={run}"]
    command += [argument for argument in sys.argv if argument.startswith("--config")]
    command += [f"--config.base={base}", f"--config.upscale.num_new_layers={gaps}"]
    try:
        write_random_checkpoint(base, hf_config, depth, experiment.max_shard_bytes)
        num_tensors = sum(1 for _ in named_tensors(model, depth + gaps))
        taken = expand_with_kills(command, run / "expanded", num_tensors, _KILLS.value)
        checked = check_grown(base, run / "expanded")
        written = sum(path.stat().st_size for path in (run / "expanded").iterdir())
        speed, upscale = measure_speed(), experiment.upscale
        source = open_checkpoint(str(base))
        settings = (depth - 2, speed, upscale.transport, upscale.epsilon)
        matrices = list(time_matrices(source, *settings))
    finally:
        for made in (base, run):
            shutil.rmtree(made, ignore_errors=True)
    seconds, peak = sum(t.seconds for t in taken), max(t.peak_bytes for t in taken)
    given = [argument for argument in sys.argv[1:] if not argument.startswith("--workdir")]
    result = {"command": given, "layers": [depth, depth + gaps], "checked": checked}
    result |= {"peak_bytes": peak, "seconds": seconds, "seconds_a_gap": seconds / gaps}
    result |= {"bytes": written, "bytes_a_gap": written / gaps, "speed": speed._asdict()}
    result |= {"processes": [vars(t) for t in taken], "matrices": matrices}
    result |= {"machine": machine("jax"), "versions": software_versions()}
    write_json(workdir / "benchmark_expand_large.json", result)
    show(
        records_table(matrices, "Transport of one gap, and the least that it could take"),
        f"{depth} -> {depth + gaps} layers, killed {sum(t.was_killed for t in taken)} times: peak "
        f"{peak / 2**30:.2f} GiB, {seconds:.0f} s, {seconds / gaps:.0f} s and "
        f"{written / gaps / 2**30:.2f} GiB written a gap",
    )


if __name__ == "__main__":
    launch.run(main)
