from pathlib import Path

import pytest

from opt_deus_jax.comparison.chosen import choose_runs, missing_tables
from opt_deus_jax.comparison.finished import FinishedRun, read_runs
from opt_deus_jax.comparison.report import summarize
from opt_deus_jax.errors import UserError
from tests.comparison.made_up_runs import a_run, method, write


@pytest.fixture
def runs(tmp_path: Path) -> list[FinishedRun]:
    contents = [a_run(name) for name in ("copy_next", "twin", "random")]
    contents.append(a_run("copy_next_middle", method=method("middle")))
    contents.append(a_run("random", kind="sweep", seed=9))
    return read_runs(write(tmp_path / "runs", *contents))


def names(runs: list[FinishedRun]) -> list[str]:
    return [run.contender for run in runs]


def test_runs_are_chosen_by_name_and_place(runs: list[FinishedRun]) -> None:
    assert choose_runs(runs) == runs
    assert names(choose_runs(runs, ["random"])) == ["random", "random"]
    assert names(choose_runs(runs, layouts=["middle"])) == ["copy_next_middle"]
    assert names(choose_runs(runs, ["twin", "random"], ["top"])) == ["random", "random", "twin"]


def test_references_stay(runs: list[FinishedRun]) -> None:
    chosen = choose_runs(runs, ["twin"], references=["copy_next", "llama_pro"])
    assert names(chosen) == ["copy_next", "twin"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"contenders": ["lesa"]}, "contenders: 'lesa' has no run; use some of copy_next, "),
        ({"layouts": ["bottom"]}, "layouts: 'bottom' has no run; use some of middle, top"),
        ({"contenders": ["twin"], "layouts": ["middle"]}, "no run of contenders twin has layout"),
    ],
)
def test_what_is_not_there_is_refused(
    runs: list[FinishedRun], given: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose_runs(runs, **given, references=["copy_next"])


def test_tables_without_rows_are_named(runs: list[FinishedRun]) -> None:
    assert missing_tables(summarize(runs, ["copy_next"])) == ["transport diagnostics"]
    sweeps = [run for run in runs if run.kind == "sweep"]
    assert missing_tables(summarize(sweeps, ["copy_next"])) == [
        "final held-out losses",
        "differences to a reference",
        "step times by place of the new layers",
        "transport diagnostics",
    ]
