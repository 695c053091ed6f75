"""Steps that several real processes take together."""

import json
from pathlib import Path
from typing import Any

import pytest

from opt_deus_jax.distributed.team import ALONE, Team, whole_program
from opt_deus_jax.errors import ResumableError, UserError
from tests import children as processes


def fail_with(team: Team, index: int, error: Exception) -> str:
    """What a step ends with that fails in one process while the others look for that."""

    def work() -> None:
        while True:
            if team.index == index:
                raise error
            team.check()

    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is what is written down
        team.run(work)
    return f"{caught.type.__name__}: {caught.value}"


def take_steps(folder: Path, address: str, count: int, index: int) -> None:
    """What each process runs."""
    processes.join(address, count, index)
    team = whole_program()
    seen = {
        "values": team.gather({"of": index}),
        "here": team.count_here(),
        "own": team.run(lambda: index),
        # Who ends a step first waits for the others.
        "refused": fail_with(team, 2, UserError("a field: remedy")),
        "full": fail_with(team, 0, ResumableError("no space")),
        "broken": fail_with(team, 1, ValueError("a bug")),
        "after": team.gather(index),
    }
    (folder / f"{index}.json").write_text(json.dumps(seen))
    processes.leave()


def test_three_processes_begin_and_end_steps_together(children: Any, tmp_path: Path):
    assert processes.end(processes.start(children, take_steps, 3, tmp_path), 200) == [0, 0, 0]
    for index in range(3):
        bug = "ResumableError: process 1 ended with ValueError; see what it wrote"
        assert json.loads((tmp_path / f"{index}.json").read_text()) == {
            "values": [{"of": 0}, {"of": 1}, {"of": 2}],
            "here": 3,
            "own": index,
            "refused": "UserError: a field: remedy",
            "full": "ResumableError: no space",
            "broken": "ValueError: a bug" if index == 1 else bug,
            "after": [0, 1, 2],
        }


def test_one_process_needs_no_other():
    assert ALONE.gather(1) == [1]
    assert ALONE.count_here() == 1
    assert fail_with(ALONE, 0, ValueError("a bug")) == "ValueError: a bug"
