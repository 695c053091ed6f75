"""Runs, their files, and what is refused before anything runs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from opt_deus_jax.comparison.runs import (
    Run,
    check_comparison,
    experiment_of,
    read_result,
    recipe_of,
    upscale_settings,
    write_result,
)
from opt_deus_jax.config import Comparison, Contender, UpscaleConfig
from opt_deus_jax.errors import UserError

HASHES = {"train": "a", "held_out": "b"}


def contender(name: str = "copy_next", **settings: Any) -> Contender:
    return Contender(name, UpscaleConfig(method="copy_next", num_new_layers=2, **settings))


def comparison(**fields: Any) -> Comparison:
    fields = {"contenders": (contender(),), "references": ("copy_next",)} | fields
    return Comparison(**fields)


def result_of(run: Run, one: Comparison) -> dict[str, Any]:
    return {
        "learning_rate": run.learning_rate,
        "upscale": upscale_settings(run.contender),
        "recipe": recipe_of(one, HASHES),
    }


FINAL = Run(contender(), "final", 1, 2e-3)


def test_a_run_differs_from_the_shared_experiment_in_what_it_tries_only():
    shared = comparison()
    run = experiment_of(shared, FINAL)
    assert (run.data.seed, run.optimizer.learning_rate) == (1, 2e-3)
    assert run.upscale == contender().upscale
    assert run.training.evaluate_every == 20
    sweep = experiment_of(shared, Run(contender(), "sweep", 1000, 2e-3))
    assert (sweep.training.steps, sweep.optimizer.warmup_steps) == (40, 4)
    same = {"data", "optimizer", "training", "upscale"}
    for field in dataclasses.fields(run):
        if field.name not in same:
            assert getattr(run, field.name) == getattr(shared.experiment, field.name)


def test_a_finished_run_is_found_again(tmp_path: Path):
    one = comparison()
    assert read_result(tmp_path, FINAL, recipe_of(one, HASHES)) is None
    write_result(tmp_path, FINAL, result_of(FINAL, one))
    assert read_result(tmp_path, FINAL, recipe_of(one, HASHES)) == result_of(FINAL, one)
    assert [path.name for path in tmp_path.iterdir()] == ["copy_next_seed1.json"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda result: result["recipe"]["records"].update(train="c"), "recipe.records.train='c'"),
        (lambda result: result["recipe"]["optimizer"].update(beta2=0.9), "recipe.optimizer.beta2"),
        (lambda result: result["recipe"]["evaluation"].update(num_fewshot=5), "num_fewshot=5"),
        (lambda result: result.update(learning_rate=1e-3), "learning_rate=0.001"),
        (lambda result: result["upscale"].update(layout="top"), "upscale.layout='top'"),
    ],
)
def test_a_run_by_another_recipe_is_refused_by_the_field(change: Any, named: str, tmp_path: Path):
    one = comparison()
    result = json.loads(json.dumps(result_of(FINAL, one)))
    change(result)
    write_result(tmp_path, FINAL, result)
    with pytest.raises(UserError, match="copy_next_seed1.json") as error:
        read_result(tmp_path, FINAL, recipe_of(one, HASHES))
    assert named in str(error.value)


def test_a_damaged_file_is_refused_by_name(tmp_path: Path):
    (tmp_path / "copy_next_seed1.json").write_text('{"recipe": ')
    with pytest.raises(UserError, match="copy_next_seed1.json"):
        read_result(tmp_path, FINAL, recipe_of(comparison(), HASHES))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"contenders": (contender(), contender())}, "'copy_next' must be unique"),
        ({"contenders": (contender("a/b"),)}, "'a/b' must be unique"),
        ({"contenders": (contender(layout="somewhere"),)}, "upscale.layout='somewhere'"),
        ({"contenders": (contender(epsilon=-1.0),)}, "upscale.epsilon=-1.0"),
        ({"references": ("llama_pro",)}, "references=('llama_pro',): name some of copy_next"),
        ({"references": ()}, "references=()"),
        ({"seeds": ()}, "seeds=()"),
        ({"seeds": (0, 1000)}, "sweep_seed=1000"),
        ({"sweep_fraction": 0.0}, "sweep_fraction=0.0"),
        ({"rate_factor": 1.0}, "rate_factor=1.0"),
        ({"questions": -1}, "questions=-1"),
        ({"questions": 1}, "questions=1"),
        ({"evaluations": 0}, "evaluations=0"),
    ],
)
def test_what_could_not_be_finished_is_refused_before_the_first_run(
    fields: dict[str, Any], named: str
):
    with pytest.raises(UserError) as error:
        check_comparison(comparison(**fields))
    assert named in str(error.value)


def test_steps_that_have_no_fifths_are_refused():
    one = comparison()
    one.experiment.training.steps = 12
    with pytest.raises(UserError, match=r"experiment\.training\.steps=12"):
        check_comparison(one)


def test_a_recipe_that_training_would_refuse_is_refused_before_a_model_is_grown():
    one = comparison()
    one.experiment.optimizer.warmup_steps, one.experiment.optimizer.decay_fraction = 50, 0.6
    with pytest.raises(
        UserError, match=r"sweep runs, of 40 steps: .* experiment\.optimizer\.warmup"
    ):
        check_comparison(one)
    one.sweep_fraction, one.experiment.optimizer.warmup_steps = 1.0, 30
    check_comparison(one)
    one.experiment.training.batch_size = 0
    with pytest.raises(UserError, match=r" experiment\.training\.batch_size=0"):
        check_comparison(one)


def test_epochs_are_refused_for_a_comparison_counts_steps():
    one = comparison()
    one.experiment.training.epochs = 2
    with pytest.raises(UserError, match=r"experiment\.training\.epochs=2: use 0"):
        check_comparison(one)


@pytest.mark.parametrize(("evaluations", "every"), [(1, 10), (5, 2)])
def test_held_out_losses_are_taken_as_often_as_asked(evaluations: int, every: int):
    one = comparison(evaluations=evaluations)
    one.experiment.training.steps = 10
    run = Run(one.contenders[0], "final", 0, 1e-3)
    assert experiment_of(one, run).training.evaluate_every == every


def test_choices_of_the_shared_experiment_are_checked():
    one = comparison()
    one.experiment.training.remat = "everything"
    with pytest.raises(UserError, match=r"experiment\.training\.remat='everything'"):
        check_comparison(one)
