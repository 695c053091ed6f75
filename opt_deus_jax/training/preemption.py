"""Stopping in good order when the scheduler takes the machine back."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

# What a shell reports for a process that SIGTERM ended.
EXIT_STATUS = 128 + signal.SIGTERM


class Preempted(Exception):
    """SIGTERM stopped the training after a checkpoint; launchers exit with `EXIT_STATUS`."""


@contextlib.contextmanager
def preemption_notice() -> Iterator[Callable[[int], bool]]:
    """Turns SIGTERM, the notice that schedulers give, into a question to ask after each step.

    With `jax.distributed` its coordinator spreads the notice and picks a step that no process has
    reached yet; otherwise the next step is it. To be used in the main thread.

    Yields:
        `is_preempted(step)`: whether to save now, and end. To be called at every step, with the
        same numbers on all processes.
    """
    if jax.distributed.is_initialized():
        # A Python handler would take the signal away from the coordinator's own.
        yield multihost_utils.reached_preemption_sync_point
        return
    noticed = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: noticed.set())
    try:
        yield lambda step: noticed.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
