"""TPU slices that are not there: their chips' figures, and devices to compile for."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from opt_deus_jax.distributed.device_facts import peak_flops
from opt_deus_jax.errors import UserError

_GIB = 2**30
# Off a TPU machine libtpu would ask the network where it is, complain at length, and let only one
# process in, as if there were a TPU to share.
_OFF_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip, which is one JAX device.

    Attributes:
        name: As in the name of a topology.
        hbm_bytes: Memory that a program may use: what XLA names as available when it runs out
            (libtpu 0.0.42), a little less than what is built in.
        hbm_bytes_per_second: Bandwidth of the memory.
        ici_bytes_per_second: Bandwidth into the chip over all its links to other chips together,
            half of the bidirectional figure.
    """

    name: str
    hbm_bytes: int
    hbm_bytes_per_second: float
    ici_bytes_per_second: float

    @property
    def flops_per_second(self) -> float:
        """Peak of bfloat16 products."""
        return peak_flops(f"TPU {self.name}") or 0.0


# Bandwidths: cloud.google.com/tpu/docs/v5e, /v5p and /v6e, "System architecture".
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", int(15.75 * _GIB), 819e9, 200e9),
        Chip("v5p", int(95.74 * _GIB), 2765e9, 600e9),
        Chip("v6e", int(31.25 * _GIB), 1640e9, 400e9),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice.

    Attributes:
        chip: What it is made of.
        shape: Chips along each dimension of the network.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        """How many chips it has."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """As users and libtpu write it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Topology:
    """Reads the name of a slice, such as `v5p:4x4x4` or `v5e:4x4`.

    Args:
        text: Chip, colon, chips along each dimension.

    Returns:
        The slice.

    Raises:
        UserError: Not of that form, or an unknown chip.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", text)
    if found is None:
        raise UserError(f"--topology={text!r}: use CHIP:AxB or CHIP:AxBxC, such as v5p:2x4x4")
    if found[1] not in CHIPS:
        raise UserError(f"--topology={text!r}: unknown chip {found[1]!r}; use {', '.join(CHIPS)}")
    return Topology(CHIPS[found[1]], tuple(int(size) for size in found[2].split("x")))


def topology_devices(topology: Topology) -> list[Any]:
    """Devices of a slice to compile for; they run nothing.

    Args:
        topology: The slice.

    Returns:
        A `jax.Device` a chip.

    Raises:
        UserError: libtpu, which holds the compiler, is not installed, or it has no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology.name}: compiling for a TPU needs libtpu; install "
            "opt_deus_jax[tpu] (no TPU is needed)"
        )
    for name, value in _OFF_A_TPU.items():
        os.environ.setdefault(name, value)
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology={topology.name}: libtpu has no such slice ({reason})"
        ) from None
    return list(description.devices)
