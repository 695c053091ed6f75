import json
import math

import numpy as np
import pytest
from scipy import stats

from opt_deus_jax.comparison import summary
from opt_deus_jax.comparison.finished import read_runs
from tests.comparison.made_up_runs import (
    TASKS,
    a_comparison,
    a_run,
    contenders,
    method,
    transport,
    write,
)

DRAW = np.random.default_rng(5)
# Seed 3 is missing at one, seed 0 at the other.
OURS = dict(zip((0, 1, 2, 4), DRAW.normal(2.7, 0.02, 4), strict=True))
THEIRS = dict(zip((1, 2, 3, 4), DRAW.normal(2.7, 0.02, 4), strict=True))
BOTH = (1, 2, 4)


def answers(accuracy: float, error: float = 0.05):
    shift = np.linspace(-0.1, 0.1, len(TASKS))
    return {
        task: {"acc": accuracy + by, "acc_stderr": error * (1 + by), "questions": 40}
        for task, by in zip(TASKS, shift, strict=True)
    }


@pytest.fixture
def runs(tmp_path):
    contents = [
        a_run(
            name,
            seed=seed,
            final=final,
            method=chosen,
            accuracies=answers(0.3 + (final - 2.7)),
            word_perplexity=math.exp(final),
            step_seconds=4 + seed,
        )
        for name, finals, chosen in (
            ("mixed", OURS, transport("barycentric")),
            ("copy_next", THEIRS, method()),
        )
        for seed, final in finals.items()
    ]
    return read_runs(write(tmp_path, *contents))


def row_of(rows, name):
    (row,) = [row for row in rows if row["contender"] == name]
    return row


def test_means_and_errors_over_seeds_are_scipys(runs):
    row, finals = row_of(summary.contender_rows(runs), "mixed"), list(OURS.values())
    assert (row["seeds"], row["layout"], row["learning_rate"]) == (4, "top", 1e-3)
    assert row["loss_100"] == pytest.approx(np.mean(finals))
    assert row["loss_stderr"] == pytest.approx(stats.sem(finals))
    assert row["loss_40"] == pytest.approx(np.mean([f + (3.24 - f) * 0.36 for f in finals]))
    assert row["word_perplexity"] == pytest.approx(np.mean(np.exp(finals)))
    assert row["word_perplexity_stderr"] == pytest.approx(stats.sem(np.exp(finals)))
    assert row["step_seconds"] == np.median([4 + seed for seed in OURS])
    assert row["accuracy"] == pytest.approx(0.3 + np.mean(finals) - 2.7)
    assert row["accuracy_stderr"] == pytest.approx(stats.sem(finals))


def test_the_error_of_the_questions_is_that_of_a_mean_of_tasks(tmp_path):
    draw, tasks = np.random.default_rng(0), {}
    rights = {"piqa": (0.7, 40), "boolq": (0.5, 25)}
    for task, (p, n) in rights.items():
        tasks[task] = {"acc": p, "acc_stderr": math.sqrt(p * (1 - p) / n), "questions": n}
    runs = read_runs(write(tmp_path, *(a_run(seed=s, accuracies=tasks) for s in range(3))))
    (row,) = summary.contender_rows(runs)
    drawn = np.mean([draw.binomial(n, p, 400_000) / n for p, n in rights.values()], axis=0)
    # More seeds ask the same questions.
    assert row["accuracy_binomial"] == pytest.approx(drawn.std(), rel=0.01)
    assert row["accuracy_stderr"] == pytest.approx(0, abs=1e-12)
    assert summary.task_accuracies(runs)["copy_next"]["piqa"] == pytest.approx(
        (0.7, tasks["piqa"]["acc_stderr"])
    )


def test_paired_differences_are_scipys(runs):
    row = row_of(summary.paired_rows(runs, ["copy_next"]), "mixed")
    ours, theirs = ([found[seed] for seed in BOTH] for found in (OURS, THEIRS))
    for metric, transform in (
        ("loss", np.asarray),
        ("accuracy", lambda x: 0.3 + np.asarray(x) - 2.7),
        ("word_perplexity", np.exp),
    ):
        a, b = transform(ours), transform(theirs)
        expected = stats.ttest_rel(a, b)
        assert row[f"{metric}_pairs"] == len(BOTH)
        assert row[f"{metric}_difference"] == pytest.approx(np.mean(a - b))
        assert row[f"{metric}_stderr"] == pytest.approx(stats.sem(a - b))
        assert row[f"{metric}_t"] == pytest.approx(expected.statistic)
        assert row[f"{metric}_p"] == pytest.approx(expected.pvalue)


def test_one_pair_has_no_error_and_none_no_difference(tmp_path):
    runs = read_runs(write(tmp_path, a_run(), a_run("one", final=2.6), a_run("other_seed", seed=7)))
    rows = summary.paired_rows(runs, ["copy_next", "not_run_yet"])
    one, other = row_of(rows[:2], "one"), row_of(rows[:2], "other_seed")
    assert one["loss_difference"] == pytest.approx(-0.1)
    assert (one["loss_pairs"], one["loss_stderr"], one["loss_t"], one["loss_p"]) == (1, *[None] * 3)
    assert (one["accuracy_pairs"], one["accuracy_difference"]) == (0, None)
    assert (other["loss_pairs"], other["loss_difference"]) == (0, None)
    assert [row["contender"] for row in rows[2:]] == ["one", "copy_next", "other_seed"]
    assert all(row["loss_difference"] is None for row in rows[2:])
    assert all(row["loss_stderr"] is None for row in summary.contender_rows(runs))


@pytest.mark.parametrize("ends", [((2.5, 2.25), (2.5, 2.25)), ((2.3, 2.2), (2.4, 2.3))])
def test_the_same_difference_in_all_pairs_has_no_t(ends, tmp_path):
    contents = [
        a_run(name, seed=seed, final=final)
        for seed, both in enumerate(ends)
        for name, final in zip("ab", both, strict=True)
    ]
    row = row_of(summary.paired_rows(read_runs(write(tmp_path, *contents)), ["a"]), "b")
    assert row["loss_difference"] == pytest.approx(ends[0][1] - ends[0][0])
    assert (row["loss_stderr"], row["loss_t"], row["loss_p"]) == (0, None, None)


def sweep(name: str, losses: dict[float, float]):
    return [a_run(name, kind="sweep", learning_rate=r, final=v) for r, v in losses.items()]


def test_sweeps_say_what_was_chosen_and_whether_better_may_lie_beyond(tmp_path):
    contents = [
        *sweep("inside", {2e-3: 2.9, 5e-4: 2.9, 1e-3: 2.8}),
        *sweep("edge", {5e-4: 2.9, 1e-3: 2.8, 2e-3: 2.7}),
        *sweep("equal", {5e-4: 3.0, 1e-3: 2.8, 2e-3: 2.8, 4e-3: math.nan}),
        *sweep("lost", {5e-4: math.nan, 1e-3: 2.9}),
        a_run("inside", learning_rate=1e-3),
        a_run("never_tried"),
    ]
    rows = summary.sweep_rows(read_runs(write(tmp_path, *contents)))
    assert row_of(rows, "inside") == {
        "contender": "inside",
        "losses": {5e-4: 2.9, 1e-3: 2.8, 2e-3: 2.9},
        "chosen": 1e-3,
        "at_edge": False,
        "used": 1e-3,
    }
    found = {row["contender"]: (row["chosen"], row["at_edge"], row["used"]) for row in rows[1:]}
    assert found["edge"] == (2e-3, True, None)
    assert found["equal"] == (1e-3, False, None)
    assert found["lost"] == (1e-3, True, None)
    assert list(found) == ["edge", "equal", "lost"]


def test_contenders_that_are_not_done_are_shown(tmp_path):
    contents = [*sweep("begun", {1e-3: 2.9}), a_run("b"), a_run("a", final=2.9)]
    rows = summary.contender_rows(read_runs(write(tmp_path, *contents)))
    assert [row["contender"] for row in rows] == ["b", "a", "begun"]
    assert (rows[2]["seeds"], rows[2]["loss_100"], rows[2]["step_seconds"]) == (0, None, None)


def test_steps_are_held_against_the_same_weights_at_the_top_on_the_same_machine(tmp_path):
    fast, slow = {"cores": 8}, {"cores": 2}
    copy, other = method(weights="copy_previous"), method("uniform", "copy_previous")
    contents = [
        a_run("copy_next", step_seconds=2.0, machine=fast),
        a_run("copy_previous", method=copy, step_seconds=2.5, machine=fast),
        a_run("copy_previous", seed=1, method=copy, step_seconds=10.0, machine=slow),
        a_run("llama_pro", method=other, step_seconds=12.0, machine=slow, seed=1),
        a_run("base", method=method(weights="", trained="all"), step_seconds=3.0, machine=fast),
        a_run("elsewhere", method=method("middle"), machine={"cores": 64}),
    ]
    for content in contents[3:5]:
        content["model_flops_per_token"] = 1e9
    runs = read_runs(write(tmp_path, *contents))
    rows = {row["contender"]: row for row in summary.step_rows(runs, ["llama_pro", "copy_next"])}
    found = {name: (row["held_against"], row["times"]) for name, row in rows.items()}
    assert found == {
        "copy_next": ("copy_next", 1.0),
        "copy_previous": ("copy_previous", 1.0),
        "llama_pro": ("copy_previous", 1.2),
        "base": ("copy_next", 1.5),
        "elsewhere": ("copy_next", None),
    }
    assert rows["llama_pro"]["times_by_flops"] == pytest.approx(1.25)


def test_steps_without_anything_at_the_top_have_no_ratio(tmp_path):
    runs = read_runs(write(tmp_path, a_run(method=method("middle"))))
    (row,) = summary.step_rows(runs, ["copy_next"])
    assert (row["held_against"], row["times"], row["times_by_flops"]) == (None, None, None)


def test_diagnostics_are_means_over_matrices(tmp_path):
    reports = [
        {"match_gain": gain, "effective_sources": 2 * gain, "norm_ratio_next": gain / 2}
        for gain in (0.8, 0.9)
    ]
    chosen = transport("assignment")
    runs = read_runs(
        write(tmp_path, a_run(), a_run("moved", method=chosen, diagnostics=reports, final=2.5))
    )
    (row,) = summary.diagnostics_rows(runs)
    assert (row["contender"], row["matrices"], row["loss"]) == ("moved", 2, 2.5)
    assert row["match_gain"] == pytest.approx(0.85)
    assert row["effective_sources"] == pytest.approx(1.7)
    assert row["norm_ratio_next"] == pytest.approx(0.425)


def test_a_run_that_diverged_is_last_and_spoils_no_other(tmp_path):
    contents = [a_run("lost", seed=s, final=v) for s, v in enumerate((math.nan, 2.5, 2.6))]
    contents += [a_run(seed=s, final=2.7 + s / 100) for s in range(3)]
    runs = read_runs(write(tmp_path, *contents))
    rows = summary.contender_rows(runs)
    assert [row["contender"] for row in rows] == ["copy_next", "lost"]
    assert rows[0]["loss_100"] == pytest.approx(2.71)
    assert math.isnan(rows[1]["loss_100"])
    (row,) = summary.paired_rows(runs, ["copy_next"])
    assert math.isnan(row["loss_difference"])


def test_where_a_seed_diverged_the_others_answers_are_no_mean_of_all(tmp_path):
    answers = {"piqa": {"acc": 0.5, "acc_stderr": 0.1, "questions": 20}}
    asked = {"accuracies": answers, "word_perplexity": 30.0}
    contents = [a_run("lost", final=math.nan), a_run("lost", seed=1, **asked), a_run(**asked)]
    kept, lost = summary.contender_rows(read_runs(write(tmp_path, *contents)))
    assert (kept["accuracy"], kept["word_perplexity"]) == (0.5, 30.0)
    for field in ("accuracy", "accuracy_stderr", "accuracy_binomial", "word_perplexity"):
        assert lost[field] is None


def test_rows_are_plain(tmp_path):
    runs = read_runs(write(tmp_path, *a_comparison(contenders(), seeds=2)))
    for rows in (
        summary.contender_rows(runs),
        summary.paired_rows(runs, ["copy_next", "llama_pro"]),
        summary.step_rows(runs, ["copy_next"]),
        summary.diagnostics_rows(runs),
    ):
        assert json.loads(json.dumps(rows)) == rows
