"""Makes the runs of a comparison: growing, training, asking."""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from opt_deus_jax.checkpoints.lock import in_turn
from opt_deus_jax.checkpoints.manifest import FILE_NAME, read_manifest
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.checkpoints.tokenizer import load_tokenizer
from opt_deus_jax.comparison.questions import Questions, ask, load_questions
from opt_deus_jax.comparison.runs import (
    Run,
    experiment_of,
    first_difference,
    read_result,
    recipe_of,
    upscale_settings,
    write_result,
)
from opt_deus_jax.comparison.shared_fields import naming_shared_fields
from opt_deus_jax.config import Comparison, Contender, Experiment
from opt_deus_jax.data.preparation import prepare_records
from opt_deus_jax.data.records import Records, load_info, load_records
from opt_deus_jax.errors import DivergedError, UserError
from opt_deus_jax.evaluation.loading import LoadedModel
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.reporting.machine import machine
from opt_deus_jax.training.export import export_checkpoint
from opt_deus_jax.training.loop import TrainingResult, train
from opt_deus_jax.training.metrics import read_metrics
from opt_deus_jax.training.program import Program, make_program, program_costs
from opt_deus_jax.training.segments import TrainedNames, invert_mask, merge, select_trained
from opt_deus_jax.training.weights import load_params
from opt_deus_jax.upscaling.expand import expand_checkpoint
from opt_deus_jax.upscaling.grown_tensors import plan_expansion
from opt_deus_jax.upscaling.methods import resolve_method
from opt_deus_jax.upscaling.probe import probe_tokens
from opt_deus_jax.whole_files import write_json

Say = Callable[[str], None]
# In the folder of an exported model: which run left it.
_MADE_AS = "comparison.json"


class Setting(NamedTuple):
    """What the runs of a comparison stand on.

    Attributes:
        comparison: The comparison.
        contenders: Those of it that are to be run.
        bases: The checkpoints that these are grown from, by `Contender.base`.
        records: Training and held-out records.
        record_hashes: Their hashes, by split.
        questions: What is asked of what is trained.
        workdir: For grown models and checkpoints.
        results: Gets a file for each finished run.
        command: What reproduces a run, recorded with it.
        say: Is told what is being done.
    """

    comparison: Comparison
    contenders: Sequence[Contender]
    bases: dict[str, CheckpointSource]
    records: dict[str, Records]
    record_hashes: dict[str, str]
    questions: dict[str, Questions]
    workdir: Path
    results: Path
    command: str
    say: Say


@naming_shared_fields()
def prepare(
    comparison: Comparison,
    chosen: Sequence[str] = (),
    *,
    workdir: Path,
    results: Path,
    command: str,
    say: Say,
) -> Setting:
    """Opens the bases, reads the questions and makes the records that all runs see.

    Args:
        comparison: The comparison, checked.
        chosen: Names of the contenders to run; empty takes all.
        workdir: Its folder.
        results: Of its results.
        command: What reproduces a run.
        say: Is told what is being done.

    Returns:
        The setting of the runs.

    Raises:
        UserError: A base, contender, text or task cannot be used.
    """
    base = open_checkpoint(comparison.experiment.base)
    contenders = [c for c in comparison.contenders if not chosen or c.name in chosen]
    bases = {"": base}
    for contender in contenders:
        if contender.base:
            with _telling_of(contender):
                bases[contender.base] = open_checkpoint(contender.base)
    tokenizer = load_tokenizer(base.side_files, base.hf_config, base.name)
    for other in bases.values():
        theirs = load_tokenizer(other.side_files, other.hf_config, other.name)
        if theirs.tokenizer_json != tokenizer.tokenizer_json:
            raise UserError(
                f"{other.name}: its tokenizer.json is not that of {base.name}, but contenders "
                "read the same tokens; give bases with one tokenizer"
            )
    questions = load_questions(comparison)
    _check_contenders(contenders, bases)
    folder = workdir / "records"
    with in_turn(claim_of(workdir, folder.name), say):
        prepare_records(
            folder,
            comparison.experiment.data,
            tokenizer,
            tokenizer_fingerprint=hashlib.sha256(tokenizer.tokenizer_json).hexdigest(),
            vocabulary_size=base.hf_config["vocab_size"],
        )
    splits = load_info(folder).splits
    records = {name: load_records(folder, name, verify=True) for name in splits}
    hashes = {name: split.sha256 for name, split in splits.items()}
    return Setting(
        comparison, contenders, bases, records, hashes, questions, workdir, results, command, say
    )


def claim_of(workdir: Path, name: str) -> Path:
    """The file that a process holds while it makes something of that name."""
    return workdir / "claims" / name


@contextlib.contextmanager
def _telling_of(contender: Contender) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(
            f"contender {contender.name}: {error}; --only=NAMES leaves a contender out"
        ) from None


def _check_contenders(
    contenders: Sequence[Contender], bases: Mapping[str, CheckpointSource]
) -> None:
    """Finds what cannot be grown before hours are spent on others."""
    for contender in contenders:
        with _telling_of(contender):
            plan_expansion(bases[contender.base], contender.upscale)


def finished_result(setting: Setting, run: Run) -> dict[str, Any] | None:
    """The result of a run where there is one, and, of one to be exported, its model here too.

    Raises:
        UserError: The result or the model is of another recipe.
    """
    found = read_result(setting.results, run, recipe_of(setting.comparison, setting.record_hashes))
    exported = _exported(setting, run)
    if found is None or exported is None or _diverged(found):
        return found
    return found if _is_exported(exported, _made_as(setting, run)) else None


@naming_shared_fields()
def make_result(setting: Setting, run: Run) -> None:
    """Grows, trains and asks; leaves the result, and the model where it is to be exported.

    A run that has a result and is made again for its model is not asked again; its result stays.

    Raises:
        UserError: Something cannot be read or written.
    """
    setting.say(f"{run.name}: learning rate {run.learning_rate:.3g}")
    recipe = recipe_of(setting.comparison, setting.record_hashes)
    before = read_result(setting.results, run, recipe)
    result = _perform(setting, run, recipe, is_asked=run.kind == "final" and before is None)
    exported = _exported(setting, run)
    if exported and not _diverged(result) and not _is_exported(exported, _made_as(setting, run)):
        _export(setting, run, exported)
    path = None if before else write_result(setting.results, run, result)
    # Large, and of no more use now that the result is written; one that diverged may have none.
    shutil.rmtree(setting.workdir / "runs" / run.name / "checkpoints", ignore_errors=True)
    loss = result["held_out"][-1]["loss"]
    where = path or "the result that was there before stays"
    setting.say(f"{run.name}: held-out loss {loss:.4f} nats a token; {where}")


def _diverged(result: Mapping[str, Any]) -> bool:
    return not math.isfinite(result["held_out"][-1]["loss"])


def _exported(setting: Setting, run: Run) -> Path | None:
    """Where the model of a run is left; None where it is not."""
    comparison, name = setting.comparison, run.contender.name
    is_first = run.kind == "final" and run.seed == comparison.seeds[0]
    return setting.workdir / "exported" / name if is_first and name in comparison.exported else None


def _made_as(setting: Setting, run: Run) -> dict[str, Any]:
    """What tells an exported model from that of another run, as JSON keeps it."""
    recipe = recipe_of(setting.comparison, setting.record_hashes)
    facts = {
        "run": run.name,
        "learning_rate": run.learning_rate,
        "upscale": upscale_settings(run.contender),
        "recipe": recipe,
    }
    return json.loads(json.dumps(facts))


def refuse_other_exports(setting: Setting) -> None:
    """Refuses models of another recipe before anything is run: only the rate is not known yet.

    Raises:
        UserError: There is one.
    """
    for contender in setting.contenders:
        run = Run(contender, "final", setting.comparison.seeds[0], math.nan)
        if folder := _exported(setting, run):
            _is_exported(folder, _made_as(setting, run) | {"learning_rate": None})


def _is_exported(folder: Path, made_as: Mapping[str, Any]) -> bool:
    """Whether the model of this very run is there; that of another is refused."""
    path = folder / _MADE_AS
    # Written last: without it the folder is of an export that was killed.
    if not path.exists():
        return False
    found = json.loads(path.read_text())
    if made_as["learning_rate"] is None:
        found["learning_rate"] = None
    if difference := first_difference(found, made_as):
        raise UserError(
            f"{folder}: exported from a run that had {difference}; use another --workdir, or "
            "delete this folder"
        )
    return True


def _export(setting: Setting, run: Run, folder: Path) -> None:
    expanded = _grow(setting, run.contender)
    if folder.exists():
        shutil.rmtree(folder)
    export_checkpoint(
        open_checkpoint(str(expanded)),
        expanded,
        setting.workdir / "runs" / run.name / "checkpoints",
        "latest",
        folder,
        max_shard_bytes=setting.comparison.experiment.max_shard_bytes,
    )
    write_json(folder / _MADE_AS, _made_as(setting, run))


def _perform(
    setting: Setting, run: Run, recipe: Mapping[str, Any], is_asked: bool
) -> dict[str, Any]:
    experiment, folder = experiment_of(setting.comparison, run), setting.workdir / "runs" / run.name
    expanded = _grow(setting, run.contender)
    manifest, source = read_manifest(expanded), open_checkpoint(str(expanded))
    config = read_model_config(source.hf_config, source.name)
    trained = select_trained(config, manifest.is_new, manifest.trained)
    manifest_hash = hashlib.sha256((expanded / FILE_NAME).read_bytes()).hexdigest()
    hashes = {f"{name} records": value for name, value in setting.record_hashes.items()}
    try:
        done = train(
            experiment,
            source,
            trained=trained,
            train_records=setting.records["train"],
            held_out_records=setting.records["held_out"],
            workdir=folder,
            fingerprints=hashes | {"grown model": manifest_hash},
            devices=jax.devices(),
        )
    except DivergedError as error:
        # A result too: of the methods, the worst.
        setting.say(f"{run.name}: {error}")
        done = None
    program = make_program(experiment, config, trained, jax.devices())
    answers = {}
    if is_asked:
        model = None if done is None else _trained_model(source, program, done)
        answers = ask(model, setting.questions)
    method = resolve_method(run.contender.upscale)
    return {
        "contender": run.contender.name,
        "kind": run.kind,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "upscale": upscale_settings(run.contender),
        "base_sha256": manifest.base["sha256"],
        "method": dataclasses.asdict(method) | {"transport": manifest.options.get("transport", "")},
        **_curve(experiment, folder, done),
        **answers,
        **_costs(program, trained, experiment.data.sequence_length),
        "diagnostics": [line for line in manifest.diagnostics if "match_gain" in line],
        "identity": manifest.identity,
        "recipe": recipe,
        "machine": machine("jax", "optax") | {"devices": _devices()},
        "command": f"{setting.command} --only={run.contender.name}",
    }


def _devices() -> str:
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def _grow(setting: Setting, contender: Contender) -> Path:
    # A name may come to mean something else between two starts; a model made of it may not.
    base = setting.bases[contender.base]
    made_as = Path(contender.base or setting.comparison.experiment.base).expanduser() / _MADE_AS
    run_of_base = [made_as.read_text()] if made_as.exists() else []
    made_from = json.dumps([base.name, upscale_settings(contender), *run_of_base])
    digest = hashlib.sha256(made_from.encode()).hexdigest()[:8]
    folder = setting.workdir / "expanded" / f"{contender.name}_{digest}"
    with in_turn(claim_of(setting.workdir, folder.name), setting.say):
        if not folder.exists():
            setting.say(f"{contender.name}: growing the base")
            expand_checkpoint(
                base,
                contender.upscale,
                folder,
                probe_BT=probe_tokens(base),
                max_shard_bytes=setting.comparison.experiment.max_shard_bytes,
                say=setting.say,
            )
    return folder


def _curve(experiment: Experiment, folder: Path, done: TrainingResult | None) -> dict[str, Any]:
    tokens_per_step = experiment.training.batch_size * experiment.data.sequence_length
    steps, all_lines = experiment.training.steps, read_metrics(folder / "metrics.jsonl")
    lines = [line for line in all_lines if "loss" in line]
    if done is None:
        held_out = [(int(m["step"]), m["held_out_loss"]) for m in all_lines if "held_out_loss" in m]
        held_out.append((steps, math.nan))
    else:
        held_out = done.held_out_losses
    seconds = statistics.median([line["step_seconds"] for line in lines] or [math.nan])
    return {
        "steps": steps,
        "tokens_per_step": tokens_per_step,
        "held_out": [
            {"step": step, "tokens": step * tokens_per_step, "loss": loss}
            for step, loss in held_out
        ],
        "training_losses": [[int(line["step"]), round(line["loss"], 5)] for line in lines],
        "step_seconds": seconds,
        "tokens_per_second": tokens_per_step / seconds,
    }


def _costs(program: Program, trained: TrainedNames, sequence_length: int) -> dict[str, Any]:
    costs = program_costs(program, sequence_length)
    return {
        "model_flops_per_token": costs.model_flops,
        "parameters": costs.parameters,
        "trained_parameters": costs.trained_parameters,
    }


def _trained_model(source: CheckpointSource, program: Program, done: TrainingResult) -> LoadedModel:
    """The trained model as it stands, without writing it to disk."""
    frozen = load_params(
        source,
        program.config,
        program.segments,
        dtype=jnp.dtype("float32"),
        shardings=program.shardings,
        wanted=invert_mask(program.mask),
    )
    tokenizer = load_tokenizer(source.side_files, source.hf_config, source.name)
    params = merge(done.state.trainable, frozen)
    return LoadedModel(params, program.config, tokenizer, program.mesh)
