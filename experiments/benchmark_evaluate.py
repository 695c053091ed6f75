r"""Holds our scoring against lm_eval's own `hf` backend: answers, accuracies, perplexity, seconds.

python -m experiments.benchmark_evaluate --config=configs/smollm2_135m.py --workdir=runs/scoring \
  --config.evaluation.local_data=FOLDER --config.evaluation.limit=200
Both score the same Hugging Face folder (of a .gguf base, WORKDIR/base/expanded is made) on the
same cores, in turn, task by task. Writes WORKDIR/benchmark_evaluate.json after each task; the same
command goes on after the last. Needs the extra `test`.
"""

import dataclasses
import logging
import os
import sys
from pathlib import Path

import tqdm
from absl import flags

from opt_deus_jax import launch
from opt_deus_jax.reporting.machine import machine
from opt_deus_jax.reporting.measured_process import run_measured
from opt_deus_jax.reporting.tables import records_table, show
from opt_deus_jax.whole_files import write_json

launch.define_flags()
_THREADS = flags.DEFINE_integer("threads", 2, "Cores that each may use.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("hf_batch_size", 8, "Of `hf`, for answers.", lower_bound=1)
_TEXTS = flags.DEFINE_integer("texts", 0, "Texts of wikitext; 0: as limit.", lower_bound=0)
_AS_IT_IS = ("upscale.method=base", "upscale.num_new_layers=0")


def _hf_folder(base: str, workdir: Path) -> str:
    """What transformers reads as we do: of a GGUF file it splits some texts in other tokens."""
    if not base.endswith(".gguf"):
        return base
    folder = workdir / "base" / "expanded"
    if not folder.exists():
        config = [f"{flag}={value}" if value else flag for flag, value in launch.config_arguments()]
        unchanged = [f"--config.{field}" for field in _AS_IT_IS]
        command = [sys.executable, "-m", "experiments.expand", *config, *unchanged]
        run_measured([*command, f"--workdir={workdir / 'base'}"])
    return str(folder)


def main() -> None:
    """Lets both answer each task in turn."""
    launch.need("test", "lm_eval", "torch")
    experiment, workdir = launch.start(("base",))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: _THREADS.value])
    # Before torch is loaded (which is slow): threads that spin while they wait stall shared cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from experiments.oracles.hf_backend import load_hf_backend, set_batch_size
    from opt_deus_jax.evaluation import side_by_side as both
    from opt_deus_jax.evaluation.lm_eval_model import OptDeusModel
    from opt_deus_jax.evaluation.tasks import is_rolling, load_tasks, name_of

    # It remarks on defaults of its own tasks.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    settings, path = experiment.evaluation, workdir / "benchmark_evaluate.json"
    facts = {"command": sys.argv[1:], **machine("jax", "lm_eval", "torch", "transformers")}
    rows = both.finished_rows(path, facts)
    both.refuse_generation(tasks := load_tasks(settings))
    folder = _hf_folder(experiment.base, workdir)
    ours = OptDeusModel(folder, settings.compute_dtype, settings.batch_tokens)
    theirs = load_hf_backend(folder, settings.compute_dtype, _THREADS.value)
    for task in tqdm.tqdm(tasks[len(rows) :], desc="tasks"):
        limit = (_TEXTS.value if is_rolling(task) else 0) or settings.limit
        asked = dataclasses.replace(settings, limit=limit)
        size = set_batch_size(theirs, task, _BATCH_SIZE.value)
        answers = (both.ask(model, asked, task) for model in (ours, theirs))
        rows.append({**both.compare_tasks(name_of(task), *answers), "hf_batch_size": size})
        write_json(path, {**facts, "tasks": rows})
    answers, seconds = both.tables(rows)
    title = "Ours and lm_eval's `hf`: values, relative difference; nats of any log-likelihood"
    show(records_table(answers, title), records_table(seconds, "Seconds of scoring"))


if __name__ == "__main__":
    launch.run(main)
