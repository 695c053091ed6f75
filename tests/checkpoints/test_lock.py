import errno
import fcntl
import os
from pathlib import Path

import pytest

from opt_deus_jax.checkpoints.lock import held_alone
from opt_deus_jax.errors import UserError


def test_a_folder_is_held_once_and_let_go(tmp_path: Path):
    for _ in range(2):
        with held_alone(tmp_path), pytest.raises(UserError) as error, held_alone(tmp_path):
            pass
        assert f"process {os.getpid()} is training here" in str(error.value)


def test_where_a_file_system_knows_no_locks_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with held_alone(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
