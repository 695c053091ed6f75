import json

import pytest

from opt_deus_jax.comparison.finished import read_run, read_runs
from opt_deus_jax.errors import UserError
from tests.comparison.made_up_runs import RECIPE, TASKS, a_run, method, write


def test_a_file_becomes_a_run(tmp_path):
    accuracies = {"piqa": {"acc": 0.6, "acc_stderr": 0.1, "questions": 20}}
    accuracies |= {"boolq": {"acc": 0.5, "acc_stderr": 0.1, "questions": 20}}
    (run,) = read_runs(write(tmp_path, a_run(final=2.5, accuracies=accuracies)))
    assert (run.contender, run.final_loss, run.loss_at(0)) == ("copy_next", 2.5, 3.24)
    assert run.loss_at(0.4) == run.held_out[2]["loss"]
    assert run.loss_at(0.5) is None
    assert run.mean_accuracy == pytest.approx(0.55)
    assert run.layout == "top"


def test_a_base_has_no_layout_and_a_stack_has(tmp_path):
    base, solar = (method(layout, "", trained="all") for layout in ("top", "stack"))
    runs = read_runs(write(tmp_path, a_run("a", method=base), a_run("b", method=solar)))
    assert [run.layout for run in runs] == ["none", "stack"]


@pytest.mark.parametrize("field", ["seed", "held_out", "recipe", "accuracies", "word_perplexity"])
def test_a_missing_field_is_named_with_its_file(tmp_path, field):
    content = a_run()
    del content[field]
    path = tmp_path / "a_run.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"a_run\.json: field {field} is missing"):
        read_run(path)


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("method", {"layout": "top"}, r"method\.weights"),
        ("recipe", {}, r"recipe\.base"),
        ("held_out", [{"step": 0, "tokens": 0}], r"held_out\.loss"),
        ("accuracies", {"piqa": {"acc": 0.5}}, r"accuracies\.acc_stderr"),
        ("diagnostics", [{"match_gain": 1}], r"diagnostics\.effective_sources"),
    ],
)
def test_a_missing_part_of_a_field_is_named(tmp_path, field, value, name):
    (path,) = write(tmp_path, a_run(**{field: value})).iterdir()
    with pytest.raises(UserError, match=rf"field {name} is missing"):
        read_run(path)


def test_a_trial_of_a_learning_rate_is_asked_nothing(tmp_path):
    content = a_run(kind="sweep")
    del content["accuracies"], content["word_perplexity"]
    (run,) = read_runs(write(tmp_path, content))
    assert (run.mean_accuracy, run.word_perplexity) == (None, None)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        read_runs(tmp_path)
    path = tmp_path / "damaged.json"
    for text, message in (("{", "no JSON"), ("[1]", "not the result of a run")):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"damaged\.json: {message}"):
            read_runs(tmp_path)
    path.write_text(json.dumps(a_run(kind="trial")))
    with pytest.raises(UserError, match="kind='trial'"):
        read_runs(tmp_path)
    path.write_text(json.dumps(a_run(held_out=[])))
    with pytest.raises(UserError, match="held_out is empty"):
        read_runs(tmp_path)
    path.write_text(json.dumps(a_run() | {"steps": 101}))
    with pytest.raises(UserError, match="held_out ends at step 100 of 101"):
        read_runs(tmp_path)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"recipe": RECIPE | {"base": "other"}}, r"recipe\.base='SmolLM2-135M'.*'other'"),
        (
            {"recipe": RECIPE | {"optimizer": {"beta2": 0.99, "clip": 1.0}}},
            r"recipe\.optimizer\.beta2=0\.95.*0\.99",
        ),
        ({"recipe": RECIPE | {"new": 1}}, r"recipe\.new=None.*1"),
        ({"learning_rate": 2e-3}, r"learning_rate=0\.001.*0\.002"),
        ({"base_sha256": "0b"}, "base_sha256='0a'.*'0b'"),
        ({"method": method("bottom")}, r"method\.layout='top'.*'bottom'"),
        ({"steps": 200}, r"steps=100.*200"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_by_field(tmp_path, changed, name):
    write(tmp_path, a_run(), a_run(seed=1, **changed))
    with pytest.raises(UserError, match=name):
        read_runs(tmp_path)


def test_contenders_may_have_bases_of_their_own(tmp_path):
    own = {"upscale": {"method": "base", "base": "grown"}, "base_sha256": "0b"}
    assert len(read_runs(write(tmp_path, a_run(), a_run("on", **own)))) == 2
    with pytest.raises(UserError, match="base_sha256='0b'.*'0c'"):
        read_runs(write(tmp_path, a_run("on", seed=1, **(own | {"base_sha256": "0c"}))))


def test_other_tasks_are_refused(tmp_path):
    answer = {"acc": 0.5, "acc_stderr": 0.1, "questions": 20}
    asked = [{task: answer for task in tasks} for tasks in (TASKS, TASKS[:2])]
    runs = [a_run(seed=seed, accuracies=found) for seed, found in enumerate([{}, *asked])]
    with pytest.raises(UserError, match="tasks of accuracies"):
        read_runs(write(tmp_path, *runs))


def test_the_same_run_twice_is_refused(tmp_path):
    write(tmp_path, a_run())
    (tmp_path / "again.json").write_text(json.dumps(a_run()))
    with pytest.raises(UserError, match="the same run as"):
        read_runs(tmp_path)
