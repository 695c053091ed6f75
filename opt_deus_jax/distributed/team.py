"""The processes of one program, which take the steps of a work together."""

import itertools
import json
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax

# The key-value store of the processes has no public name; Orbax takes this one too. A collective
# would do for short waits only: its backends give up on a process that is busy for minutes.
from jax._src import distributed

from opt_deus_jax.errors import ResumableError, UserError

_T = TypeVar("_T")
_FOLDER = "opt_deus_jax/steps"
# Every process counts the steps of the program alike.
_STEPS = itertools.count()
_LONGEST_PAUSE = 1.0
_SECONDS_BETWEEN_LOOKS = 1.0


class Team:
    """Processes that all take the same steps in the same order.

    Attributes:
        index: Which of them this one is.
        count: How many there are.
    """

    def __init__(self, index: int, count: int):
        """Needs no other process yet."""
        self.index, self.count = index, count
        self._step = ""
        self._next_look = 0.0

    @property
    def is_first(self) -> bool:
        """Whether this process does what is done once."""
        return self.index == 0

    def count_here(self) -> int:
        """How many of the processes run on this machine; a step, like `gather`."""
        return self.gather(socket.gethostname()).count(socket.gethostname())

    def run(self, work: Callable[[], _T]) -> _T:
        """Takes a step: returns when it is done in all processes, and fails in all if in one.

        Args:
            work: What this process does; calls `check` now and then where it takes long.

        Returns:
            What `work` returned here.

        Raises:
            UserError: That of the first process that raised one; by then all have ended the step.
            ResumableError: Another process ended with a traceback, or is gone.
        """
        if self.count == 1:
            return work()
        self._step = f"{_FOLDER}/{next(_STEPS)}/"
        failure, made = None, []
        try:
            made.append(work())
        except UserError as error:
            failure = {"message": str(error), "kept": isinstance(error, ResumableError)}
        except BaseException as error:
            message = f"process {self.index} ended with {type(error).__name__}; see what it wrote"
            self._post({"failure": {"message": message, "kept": True}})
            raise
        self._post({"failure": failure})
        _raise_first(self._wait())
        return made[0]

    def gather(self, value: Any) -> list[Any]:
        """Takes a step that shows every process what each of them has.

        Args:
            value: JSON.

        Returns:
            The values of all processes, by their index.
        """
        if self.count == 1:
            return [value]
        self._step = f"{_FOLDER}/{next(_STEPS)}/"
        self._post({"failure": None, "value": value})
        return [posted["value"] for posted in self._wait()]

    def check(self) -> None:
        """Looks, once a second at most, whether a step has failed elsewhere.

        Raises:
            UserError: It has.
        """
        if self.count == 1 or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _SECONDS_BETWEEN_LOOKS
        _raise_first(self._posted())

    def _post(self, content: Any) -> None:
        _store(
            lambda client: client.key_value_set(f"{self._step}{self.index}", json.dumps(content))
        )

    def _posted(self) -> list[Any]:
        """What processes have posted about this step, by their index."""
        found = _store(lambda client: client.key_value_dir_get(self._step))
        by_index = {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}
        return [by_index[index] for index in sorted(by_index)]

    def _wait(self) -> list[Any]:
        # A process that is gone ends the others: see processes.py.
        pause = 0.02
        while len(posted := self._posted()) < self.count:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return posted


ALONE = Team(0, 1)


def whole_program() -> Team:
    """All processes that `start_processes` has joined."""
    return Team(jax.process_index(), jax.process_count())


def _raise_first(posted: list[Any]) -> None:
    for content in posted:
        if failure := content["failure"]:
            kind = ResumableError if failure["kept"] else UserError
            raise kind(failure["message"])


def _store(use: Callable[[Any], _T]) -> _T:
    try:
        return use(distributed.global_state.client)
    except RuntimeError as error:
        raise ResumableError(
            f"process 0 or another is gone ({error}); start all again: what is whole is kept"
        ) from None
