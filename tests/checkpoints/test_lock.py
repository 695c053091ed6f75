import contextlib
import errno
import fcntl
import os
from pathlib import Path

import pytest

from opt_deus_jax.checkpoints.lock import claimed, held_alone, in_turn
from opt_deus_jax.errors import UserError


def test_a_folder_is_held_once_and_let_go(tmp_path: Path):
    for _ in range(2):
        with held_alone(tmp_path), pytest.raises(UserError) as error, held_alone(tmp_path):
            pass
        assert f"process {os.getpid()} is training here" in str(error.value)


def test_a_claim_is_had_once_and_let_go(tmp_path: Path):
    for _ in range(2):
        with (
            claimed(tmp_path / "claims" / "a") as ours,
            claimed(tmp_path / "claims" / "a") as other,
        ):
            assert (ours, other) == (True, False)


def test_a_turn_comes_when_the_other_has_ended(tmp_path: Path):
    said = []
    with in_turn(tmp_path / "a", said.append):
        assert not said
    with contextlib.ExitStack() as other:
        other.enter_context(claimed(tmp_path / "a"))

        def say(line: str) -> None:
            said.append(line)
            other.close()

        with in_turn(tmp_path / "a", say), claimed(tmp_path / "a") as theirs:
            assert not theirs
    assert said == ["a: another process makes it; waiting"]


def test_where_a_file_system_knows_no_locks_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with held_alone(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    with claimed(tmp_path / "a") as ours, in_turn(tmp_path / "a", print):
        assert ours
