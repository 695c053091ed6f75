r"""Times the transport of an expansion against POT's log-domain Sinkhorn, and weighs an expansion.

python -m experiments.benchmark_expand --config=configs/smollm2_135m.py --workdir=runs/benchmark
Both solve the raw kernels of --gaps at one epsilon, POT in float64 until its marginal error is ours
or --pot_iterations are made (its time is then a lower bound, and marked so). Needs extra `test`.
"""

import functools
import itertools
import sys
import time

import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.oracles.pot_sinkhorn import time_pot
from opt_deus_jax import launch
from opt_deus_jax.checkpoints.manifest import software_versions
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import block_specs
from opt_deus_jax.reporting.measured_process import run_measured
from opt_deus_jax.reporting.tables import records_table, show
from opt_deus_jax.transport.sinkhorn import solve_sinkhorn
from opt_deus_jax.upscaling.fusion import transport_epsilon
from opt_deus_jax.whole_files import write_json

launch.define_flags()
_GAPS = flags.DEFINE_list("gaps", ["15", "22"], "Gaps in which both solve.")
_ITERATIONS = flags.DEFINE_integer("pot_iterations", 500, "POT stops here.", lower_bound=10)
_MATRICES = ("query", "key", "value", "output", "gate", "up")


def _solve_both(previous: np.ndarray, next_: np.ndarray, epsilon: float) -> dict[str, object]:
    solve = functools.partial(solve_sinkhorn, epsilon=epsilon, relative=True)
    a, b = jnp.asarray(previous), jnp.asarray(next_)
    np.asarray(solve(a, b).plan_MN)  # compiled once per shape, in the expansion's own time
    start = time.perf_counter()
    plan = np.asarray(solve(a, b).plan_MN, np.float64)
    ours = time.perf_counter() - start
    # POT stops by the 2-norm of the target marginal's error.
    error = float(np.linalg.norm(plan.sum(axis=0) - 1 / plan.shape[1]))
    pot, pot_error = time_pot(
        previous, next_, epsilon=epsilon, marginal_error=error, max_iterations=_ITERATIONS.value
    )
    row = {"ours_s": ours, "pot_s": pot, "ours_error": error, "pot_error": pot_error}
    return {**row, "lower_bound": pot_error > error, "speedup": pot / ours}


def main() -> None:
    """Measures a whole expansion in a process of its own, then the solvers side by side."""
    experiment, workdir = launch.start(("base", "upscale"))
    launch.need("test", "ot")
    given = [argument for argument in sys.argv if argument.startswith("--config")]
    command = [sys.executable, "-m", "experiments.expand", *given, f"--workdir={workdir}/expand"]
    expansion = run_measured(command)
    source = open_checkpoint(experiment.base)
    specs = block_specs(read_model_config(source.hf_config))
    epsilon = transport_epsilon("barycentric", experiment.upscale.epsilon)
    rows = []
    for gap, name in itertools.product(map(int, _GAPS.value), _MATRICES):
        hf_name = specs[f"{name}_kernel"].hf_name
        a, b = (source.read(hf_name.format(layer=gap + i)).astype(np.float32) for i in (0, 1))
        rows.append({"gap": gap, "matrix": name, **_solve_both(a, b, epsilon)})
    speedup = sum(row["pot_s"] for row in rows) / sum(row["ours_s"] for row in rows)
    show(
        records_table(rows, "Seconds of a solve, and the 2-norm of its marginal error"),
        f"speed-up over these gaps: at least {speedup:.1f}",
        f"whole expansion: {expansion.seconds:.1f} s, peak {expansion.peak_bytes / 2**30:.2f} GiB",
    )
    result = {"command": sys.argv[1:], "epsilon_relative": epsilon, "speedup": speedup}
    result |= {"expansion_s": expansion.seconds, "expansion_peak_bytes": expansion.peak_bytes}
    result |= {"matrices": rows, "versions": software_versions()}
    write_json(workdir / "benchmark_expand.json", result)


if __name__ == "__main__":
    launch.run(main)
