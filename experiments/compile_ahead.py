r"""Compiles the training step for a TPU slice, without a TPU, weights or data.

python -m experiments.compile_ahead --config=configs/llama3.py:8b_shape_v5p --topology=v5p:2x4x4
Shows what the step takes of each chip's memory, its FLOPs, its collectives and its least time.
Exits with status 1 and the number of bytes that are missing where it does not fit. With
--output=FILE the figures are also written as JSON.
"""

import time
from pathlib import Path

import jax
from absl import flags

from opt_deus_jax import launch
from opt_deus_jax.checkpoints.manifest import FILE_NAME, read_manifest
from opt_deus_jax.checkpoints.opening import read_config_only
from opt_deus_jax.distributed.compiled_report import (
    analyse,
    argument_bytes,
    as_json,
    compile_for,
    does_not_fit,
    report_table,
)
from opt_deus_jax.distributed.topology import parse_topology, topology_devices
from opt_deus_jax.models.model_config import grown_hf_config, read_model_config
from opt_deus_jax.reporting.tables import show
from opt_deus_jax.training.ahead import lower_train_step
from opt_deus_jax.training.segments import select_trained
from opt_deus_jax.upscaling.methods import layer_parents, plan_layers, resolve_method
from opt_deus_jax.whole_files import write_json

_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice, such as v5p:4x4x4.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "File that gets the figures as JSON.")
launch.define_flags(needs_workdir=False, others=(_TOPOLOGY.name, _OUTPUT.name))


def main() -> None:
    """Compiles and reports."""
    # Nothing is run: the CPU holds the constants while the compiler works for the slice.
    jax.config.update("jax_platforms", "cpu")
    experiment = launch.experiment_from_flags()
    topology = parse_topology(_TOPOLOGY.value)
    devices = topology_devices(topology)
    hf_config, model = read_config_only(experiment.base)
    method, upscale = resolve_method(experiment.upscale), experiment.upscale
    is_grown = upscale.method == "base" and (Path(experiment.base) / FILE_NAME).exists()
    manifest = read_manifest(Path(experiment.base)) if is_grown else None
    layers = plan_layers(upscale, model.num_layers, manifest)
    grown = read_model_config(grown_hf_config(hf_config, layer_parents(method, layers)))
    trained = select_trained(grown, [layer.is_new for layer in layers], method.trained)
    start = time.perf_counter()
    step = lower_train_step(experiment, grown, trained, devices)
    compiled = compile_for(step.lowered, topology, argument_bytes(step.arguments))
    report = analyse(
        compiled,
        topology,
        tokens=step.tokens,
        model_flops=step.model_flops,
        compile_seconds=time.perf_counter() - start,
    )
    show(report_table(report, f"{experiment.base}, {len(layers)} layers, on {topology.name}"))
    if _OUTPUT.value:
        write_json(Path(_OUTPUT.value).expanduser(), as_json(report))
    if report.missing_bytes:
        raise does_not_fit(topology, report.missing_bytes)


if __name__ == "__main__":
    launch.run(main)
