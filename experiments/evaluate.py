r"""Evaluates a model with lm_eval: the paper's eight tasks, or any others.

python -m experiments.evaluate --config=configs/smollm2_135m.py --workdir=runs/first
Takes WORKDIR/exported, or --model=base (before growing), expanded (before training), or any Hugging
Face folder, .gguf file or hub id. Questions come from the hub, or offline from
--config.evaluation.local_data=FOLDER. Writes WORKDIR/evaluation/NAME.json in lm_eval's format, with
--samples also every question and answer. Needs the extra `eval`.
"""

import logging
from pathlib import Path

import jax
from absl import flags

from opt_deus_jax import launch
from opt_deus_jax.distributed import processes
from opt_deus_jax.errors import UserError
from opt_deus_jax.reporting.tables import records_table, show

_MODEL = flags.DEFINE_string(
    "model", "exported", "base, expanded, exported, or a folder, .gguf file or hub id."
)
_NAME = flags.DEFINE_string("name", "", "Of the results; empty: that of the model.")
_SAMPLES = flags.DEFINE_bool("samples", False, "Whether to write every question and answer.")
launch.define_flags(others=("model", "name", "samples", *processes.key_flags()))


def _checkpoint(base: str, workdir: Path) -> str:
    if _MODEL.value == "base":
        return base
    if _MODEL.value not in ("expanded", "exported"):
        return _MODEL.value
    folder = workdir / _MODEL.value
    if not folder.exists():
        maker = "expand" if _MODEL.value == "expanded" else "export"
        raise UserError(
            f"--model={_MODEL.value}: {folder} is missing; run experiments.{maker} with the same "
            "flags, or choose another --model"
        )
    return str(folder)


def main() -> None:
    """Loads the tasks and the model, asks, and writes what came of it."""
    processes.start_processes()
    is_writer = jax.process_index() == 0
    # The base of another experiment would be scored as that of this one.
    fixed = ("base",) if _MODEL.value == "base" else ()
    experiment, workdir = launch.start(fixed, is_writer=is_writer)
    settings, pretrained = experiment.evaluation, _checkpoint(experiment.base, workdir)
    # Slow to import, and lm_eval may be missing.
    from opt_deus_jax.evaluation.lm_eval_model import OptDeusModel
    from opt_deus_jax.evaluation.loading import load_model
    from opt_deus_jax.evaluation.results import metric_rows, refuse_other_model, write_results
    from opt_deus_jax.evaluation.tasks import load_tasks, run_tasks

    # It remarks on defaults of its own tasks.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    path = Path(pretrained)
    name = _NAME.value or (path.stem if path.suffix == ".gguf" else path.name)
    refuse_other_model(workdir / "evaluation", name, pretrained)
    tasks = load_tasks(settings)
    loaded = load_model(pretrained, mesh=experiment.mesh, dtype=settings.compute_dtype)
    model = OptDeusModel(loaded, settings.compute_dtype, settings.batch_tokens)
    results = run_tasks(model, settings, tasks=tasks, log_samples=_SAMPLES.value)
    if not is_writer:
        return
    results["config"]["model_args"] = {"pretrained": pretrained}
    path = write_results(workdir / "evaluation", name, results)
    cut = f"questions cut from the left to fit the context: {model.truncated_requests}"
    title = f"{name}: {settings.num_fewshot}-shot"
    show(records_table(metric_rows(results), title), cut, f"results: {path}")


if __name__ == "__main__":
    launch.run(main)
