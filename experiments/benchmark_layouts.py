r"""Times a training step of several layouts against its exact FLOPs.

python -m experiments.benchmark_layouts --config=configs/smollm2_135m.py --workdir=runs/layouts
Steps of all layouts are taken in turn, on drawn weights and tokens (which do not change their
time); of `stack` everything is trained, of the others the new layers. Writes
WORKDIR/benchmark_layouts.json.
"""

import statistics
import sys

import numpy as np
from absl import flags

from opt_deus_jax import launch
from opt_deus_jax.checkpoints.opening import read_config_only
from opt_deus_jax.models.accounting import count_costs
from opt_deus_jax.models.model_config import grown_hf_config, read_model_config
from opt_deus_jax.reporting.machine import machine
from opt_deus_jax.reporting.tables import records_table, show
from opt_deus_jax.training.segments import select_trained
from opt_deus_jax.training.timing import prepare_step, random_source, time_in_turns
from opt_deus_jax.upscaling.layout import parents_of, plan_layout
from opt_deus_jax.whole_files import write_json

launch.define_flags()
_LAYOUTS = flags.DEFINE_list("layouts", ["top", "middle", "bottom", "stack"], "What to time.")
_STEPS = flags.DEFINE_integer("timed_steps", 5, "Timed steps of each.", lower_bound=1)


def main() -> None:
    """Prepares a step of each layout, then times them in turn."""
    experiment, workdir = launch.start(())
    training, length = experiment.training, experiment.data.sequence_length
    base, base_config = read_config_only(experiment.base)
    num_new = experiment.upscale.num_new_layers
    steps, flops = {}, {}
    for layout in _LAYOUTS.value:
        layers = plan_layout(layout, base_config.num_layers, num_new)
        hf_config = grown_hf_config(base, parents_of(layers, prefer_previous=False))
        config, is_new = read_model_config(hf_config), [layer.is_new for layer in layers]
        trained = select_trained(config, is_new, "all" if layout == "stack" else "new")
        costs = count_costs(
            *(config, trained.outer, trained.blocks),
            sequence_length=length,
            frozen_bytes=4,
            remat=training.remat,
            experts=training.experts,
        )
        repeated = costs.recomputed_flops + costs.idle_expert_flops
        flops[layout] = costs.model_flops + repeated
        steps[layout] = prepare_step(experiment, random_source(hf_config), trained)
    shape = (training.batch_size, length + 1)
    tokens_BL = np.random.default_rng(0).integers(0, base_config.vocabulary_size, shape, np.int32)
    seconds = time_in_turns(steps, tokens_BL, _STEPS.value)
    medians = {layout: statistics.median(taken) for layout, taken in seconds.items()}
    first, rows = _LAYOUTS.value[0], []
    for layout, median in medians.items():
        ratios = median / medians[first], flops[layout] / flops[first]
        row = {"layout": layout, "step_s": median, "gflops_a_token": flops[layout] / 1e9}
        row |= {"times": ratios[0], "times_by_flops": ratios[1], "error": ratios[0] / ratios[1] - 1}
        rows.append(row)
    show(records_table(rows, f"{shape[0]} x {length} tokens a step; times: those of {first}"))
    result = {"command": sys.argv[1:], "layouts": rows, "seconds": seconds}
    write_json(workdir / "benchmark_layouts.json", result | machine("jax", "optax"))


if __name__ == "__main__":
    launch.run(main)
