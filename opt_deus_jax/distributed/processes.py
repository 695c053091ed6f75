"""Several processes as one JAX program: the flags that say so, and the start."""

import jax
from absl import flags

from opt_deus_jax.errors import UserError

# A process that is gone is noticed by the others after so many seconds.
_HEARTBEAT_SECONDS = 30
# How long one that stops waits for the others: they may be in a step that it will not join.
_SHUTDOWN_SECONDS = 45
_START_SECONDS = 300

_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "For several processes: `auto` on SLURM, Open MPI, GKE and TPU VMs, which know them; else "
    "HOST:PORT of process 0, with --num_processes and --process_id. Empty: one process.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "With --coordinator=HOST:PORT: how many processes there are."
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "With --coordinator=HOST:PORT: which of them this is, from 0."
)


def key_flags() -> tuple[str, ...]:
    """Names of the flags that this module defines."""
    return _COORDINATOR.name, _NUM_PROCESSES.name, _PROCESS_ID.name


def start_processes() -> None:
    """Joins this process with the others, as the flags say; call it before JAX is used.

    From then on `jax.devices()` are those of all processes. When one process is gone the others
    end with an error within a minute.

    Raises:
        UserError: The flags contradict each other, or the others were not found.
    """
    explicit = (_NUM_PROCESSES.value, _PROCESS_ID.value)
    if _COORDINATOR.value in ("", "auto"):
        for name, value in zip(key_flags()[1:], explicit, strict=True):
            if value is not None:
                raise UserError(f"--{name}={value}: goes with --coordinator=HOST:PORT only")
    if not _COORDINATOR.value:
        return
    address = None if _COORDINATOR.value == "auto" else _COORDINATOR.value
    if address is not None:
        _check_explicit(address, *explicit)
    try:
        jax.distributed.initialize(
            address,
            *explicit,
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--coordinator={_COORDINATOR.value}: the processes were not joined ({error}); give "
            "HOST:PORT with --num_processes and --process_id"
        ) from None


def _check_explicit(address: str, count: int | None, index: int | None) -> None:
    if count is None or index is None:
        raise UserError(
            f"--coordinator={address}: needs --num_processes and --process_id; or use auto"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator={address}: not HOST:PORT")
    if not 0 <= index < count:
        raise UserError(f"--process_id={index}: use 0 to {count - 1}, below --num_processes")
