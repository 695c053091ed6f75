r"""Compares ways to grow a model: each trained alike, on the same text in the same order.

python -m experiments.compare --config=configs/compare_smollm2.py --workdir=runs/compare
For every contender of the config it tries learning rates, trains once for each seed and asks the
tasks. A finished run leaves RESULTS/NAME.json and is not made again: interrupt it, start it again,
on another machine too. SIGTERM saves the step and exits with status 143. Start it once for each
device (CUDA_VISIBLE_DEVICES=N, or taskset -c N): all with one --workdir share the runs. Then it
writes tables and pictures to RESULTS/report, as far as the runs go; --report_only makes only these.
--published=FILE draws the authors' official_results.json beside.
"""

import contextlib
import shlex
import tempfile
from pathlib import Path

import jax
from absl import flags

from opt_deus_jax import launch
from opt_deus_jax.checkpoints.lock import in_turn
from opt_deus_jax.comparison.finished import read_runs
from opt_deus_jax.comparison.report import summarize, summary_tables, write_report
from opt_deus_jax.comparison.running import claim_of, prepare
from opt_deus_jax.comparison.runs import check_comparison
from opt_deus_jax.comparison.schedule import run_all
from opt_deus_jax.config import Comparison
from opt_deus_jax.errors import UserError
from opt_deus_jax.reporting.tables import show

_RESULTS = flags.DEFINE_string("results", "", "Folder of the results; empty: WORKDIR/results.")
_ONLY = flags.DEFINE_list("only", [], "Contenders to run; empty: all.")
_REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Run nothing, report what is there.")
_PUBLISHED = flags.DEFINE_string("published", "", "The authors' official_results.json.")
launch.define_flags(others=("results", "only", "report_only", "published"))


def _command() -> str:
    """What reproduces a run elsewhere: without the folders of this machine."""
    words = ["python", "-m", "experiments.compare"]
    for flag, value in launch.config_arguments():
        named = (p.rpartition("/")[2] if p.startswith("/") else p for p in value.split(","))
        words.append(f"{flag}={','.join(named)}" if value else flag)
    return shlex.join(words)


def main() -> None:
    """Runs what has no result yet, then reports."""
    comparison = flags.FLAGS.config
    if not isinstance(comparison, Comparison):
        raise UserError("--config: get_config() must return opt_deus_jax.config.Comparison")
    check_comparison(comparison)
    names = [contender.name for contender in comparison.contenders]
    unknown = [name for name in _ONLY.value if name not in names]
    if unknown:
        raise UserError(f"--only={unknown[0]}: no contender; use some of {', '.join(names)}")
    workdir = Path(flags.FLAGS.workdir).expanduser().absolute()
    results = Path(_RESULTS.value or workdir / "results").expanduser().absolute()
    if not _REPORT_ONLY.value:
        # What seeds, rates and contenders have in common is compiled once.
        with tempfile.TemporaryDirectory(prefix="opt_deus_compiled_") as compiled:
            if not jax.config.jax_compilation_cache_dir:  # pyright: ignore
                jax.config.update("jax_compilation_cache_dir", compiled)
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            folders = {"workdir": workdir, "results": results}
            setting = prepare(comparison, _ONLY.value, **folders, command=_command(), say=show)
            run_all(setting)
    published = Path(_PUBLISHED.value).expanduser() if _PUBLISHED.value else None
    # Processes that share the runs end together.
    claim = claim_of(workdir, "report")
    alone = contextlib.nullcontext() if _REPORT_ONLY.value else in_turn(claim, show)
    with alone:
        written = write_report(results, results / "report", comparison.references, published)
    show(*summary_tables(summarize(read_runs(results), comparison.references)))
    show(f"{len(written)} tables and pictures: {results / 'report'}")


if __name__ == "__main__":
    launch.run(main)
