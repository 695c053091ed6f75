from collections.abc import Iterator

import jax
import pytest
from absl import flags

from opt_deus_jax.distributed import processes
from opt_deus_jax.errors import UserError


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    saved = {name: flags.FLAGS[name].value for name in processes.key_flags()}
    yield
    flags.FLAGS.unparse_flags()
    for name, value in saved.items():
        flags.FLAGS[name].value = value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--process_id=2"], "--process_id=2: goes with --coordinator=HOST:PORT only"),
        (["--coordinator=auto", "--num_processes=2"], "--num_processes=2: goes with"),
        (["--coordinator=h:1"], "needs --num_processes and --process_id; or use auto"),
        (["--coordinator=h:1", "--num_processes=2"], "needs --num_processes and --process_id"),
        (["--coordinator=here", "--num_processes=2", "--process_id=0"], "not HOST:PORT"),
        (["--coordinator=h:1", "--num_processes=2", "--process_id=2"], "process_id=2: use 0 to 1"),
        # Nothing here knows of a cluster.
        (["--coordinator=auto"], "--coordinator=auto: the processes were not joined"),
    ],
)
def test_flags_that_cannot_work_are_named(arguments: list[str], message: str):
    flags.FLAGS(["train", *arguments])
    with pytest.raises(UserError, match=message):
        processes.start_processes()


def test_without_flags_there_is_one_process():
    flags.FLAGS(["train"])
    processes.start_processes()
    assert jax.process_count() == 1
