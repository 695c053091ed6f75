"""What a program compiled for a TPU slice needs of each chip, and how fast it can be at best."""

import dataclasses
import math
import re
from typing import Any

import jax
from rich.table import Table

from opt_deus_jax.distributed.hlo_costs import HloCosts, count_hlo
from opt_deus_jax.distributed.hlo_text import parse_hlo
from opt_deus_jax.distributed.topology import Chip, Topology
from opt_deus_jax.errors import UserError

_SUFFIXES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\)")
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm")


@dataclasses.dataclass(frozen=True)
class ChipMemory:
    """Bytes of one chip's memory while a program runs.

    Attributes:
        arguments: What the program is given.
        outputs: What it returns.
        aliased: The part of the outputs that takes the place of arguments.
        temporaries: What exists only while it runs.
        code: The program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """All of it together."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Least times of one run, in seconds, were each resource the only one.

    Attributes:
        compute: FLOPs at the chip's peak.
        memory: Bytes at its memory's bandwidth.
        network: Bytes received at the bandwidth of all its links together.
    """

    compute: float
    memory: float
    network: float

    @property
    def step(self) -> float:
        """The longest of the three: no run is faster, if everything overlaps it is as fast."""
        return max(self.compute, self.memory, self.network)


@dataclasses.dataclass(frozen=True)
class CompiledReport:
    """A compiled training step on a slice; counts are those of one chip.

    Attributes:
        topology: Name of the slice.
        num_chips: Its chips.
        hbm_bytes: Memory of a chip that programs may use.
        memory: What the step takes of it.
        costs: FLOPs, bytes and collectives of a step.
        roofline: Its least times.
        tokens: Tokens a step, of all chips.
        model_flops: FLOPs a step that training cannot do without, of all chips.
        utilisation: Those over what all chips could do in the roofline's time; an upper bound. The
            model's count holds the masked half of attention, which programs leave out, so that it
            may exceed 1.
        compile_seconds: How long tracing and compiling took.
    """

    topology: str
    num_chips: int
    hbm_bytes: int
    memory: ChipMemory
    costs: HloCosts
    roofline: Roofline
    tokens: int
    model_flops: int
    utilisation: float
    compile_seconds: float

    @property
    def missing_bytes(self) -> int:
        """Bytes by which the step exceeds a chip's memory, 0 where it fits."""
        return max(0, self.memory.total - self.hbm_bytes)


def argument_bytes(arguments: Any) -> int:
    """Bytes that one chip holds of abstract arguments.

    Args:
        arguments: A tree of `jax.ShapeDtypeStruct` with shardings.

    Returns:
        Bytes, without the padding of tiles.
    """
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(arguments)
    )


def does_not_fit(topology: Topology, missing: int) -> UserError:
    """The error of a step that is too large for a slice, to be raised."""
    return UserError(
        f"--topology={topology.name}: the training step does not fit: it needs {missing:,} bytes "
        f"more a chip than the {topology.chip.hbm_bytes:,} there are; use more chips, a smaller "
        "training.batch_size, more training.accumulation_steps or training.remat=block"
    )


def compile_for(
    lowered: jax.stages.Lowered, topology: Topology, given_bytes: int
) -> jax.stages.Compiled:
    """Compiles a program for a slice.

    Args:
        lowered: The program, lowered for the devices of the slice.
        topology: The slice.
        given_bytes: Bytes of a chip's arguments.

    Returns:
        The compiled program.

    Raises:
        UserError: XLA found no way to make it fit; the message names the bytes that are missing, as
            exactly as XLA states them (to a hundredth of a GiB).
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        used, temporaries = _USED.search(message), _TEMPORARIES.search(message)
        found = used or temporaries
        if found is None:
            raise
        needed = int(float(found[1]) * _SUFFIXES[found[2]]) + (0 if used else given_bytes)
        raise does_not_fit(topology, max(1, needed - topology.chip.hbm_bytes)) from None


def chip_memory(compiled: jax.stages.Compiled) -> ChipMemory:
    """What XLA states of the memory of one device."""
    stats: Any = compiled.memory_analysis()
    return ChipMemory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


def roofline(costs: HloCosts, chip: Chip) -> Roofline:
    """The least times of a program on a chip (Williams, Waterman and Patterson 2009)."""
    received = sum(collective.num_bytes for collective in costs.collectives.values())
    return Roofline(
        costs.flops / chip.flops_per_second,
        costs.hbm_bytes / chip.hbm_bytes_per_second,
        received / chip.ici_bytes_per_second,
    )


def analyse(
    compiled: jax.stages.Compiled,
    topology: Topology,
    *,
    tokens: int,
    model_flops: int,
    compile_seconds: float,
) -> CompiledReport:
    """Reads what a compiled training step takes.

    Args:
        compiled: The step.
        topology: The slice that it is compiled for.
        tokens: Tokens a step, of all chips.
        model_flops: FLOPs a step that training cannot do without, of all chips.
        compile_seconds: How long compiling took.

    Returns:
        The report.

    Raises:
        ValueError: The program has a loop whose turns cannot be counted.
    """
    costs = count_hlo(parse_hlo(compiled.as_text() or ""))
    times = roofline(costs, topology.chip)
    possible = times.step * topology.num_chips * topology.chip.flops_per_second
    return CompiledReport(
        topology=topology.name,
        num_chips=topology.num_chips,
        hbm_bytes=topology.chip.hbm_bytes,
        memory=chip_memory(compiled),
        costs=costs,
        roofline=times,
        tokens=tokens,
        model_flops=model_flops,
        utilisation=model_flops / possible,
        compile_seconds=compile_seconds,
    )


def as_json(report: CompiledReport) -> dict[str, Any]:
    """The report and what follows from it, for a file."""
    return dataclasses.asdict(report) | {
        "total_bytes": report.memory.total,
        "missing_bytes": report.missing_bytes,
        "step_seconds": report.roofline.step,
    }


def memory_table(memory: ChipMemory, title: str) -> Table:
    """A line per part of a device's memory, of devices whose limits are not known too."""
    table = Table("quantity", "a device", title=title)
    table.columns[1].justify = "right"
    for row in _memory_rows(memory):
        table.add_row(*row)
    return table


def _memory_rows(memory: ChipMemory) -> list[tuple[str, str]]:
    return [
        ("memory: arguments", f"{memory.arguments:,} B"),
        ("memory: temporaries", f"{memory.temporaries:,} B"),
        ("memory: outputs not in place of arguments", f"{memory.outputs - memory.aliased:,} B"),
        ("memory: program", f"{memory.code:,} B"),
        ("memory: total", f"{memory.total:,} B"),
    ]


def report_table(report: CompiledReport, title: str) -> Table:
    """A line per quantity, those of a chip first."""
    memory, costs, times = report.memory, report.costs, report.roofline
    table = Table("quantity", "a chip", title=title)
    table.columns[1].justify = "right"
    share = memory.total / report.hbm_bytes
    rows = [
        *_memory_rows(memory),
        (f"memory: of {report.hbm_bytes:,} B", f"{share:.1%}"),
        ("FLOPs a step", f"{costs.flops:,}"),
        ("memory traffic a step", f"{costs.hbm_bytes:,} B"),
    ]
    for kind, collective in sorted(costs.collectives.items()):
        rows.append((f"{kind}: {collective.count:,} a step", f"{collective.num_bytes:,} B"))
    rows += [
        ("least time: products", f"{times.compute * 1e3:,.1f} ms"),
        ("least time: memory", f"{times.memory * 1e3:,.1f} ms"),
        ("least time: network", f"{times.network * 1e3:,.1f} ms"),
        ("least time of a step", f"{times.step * 1e3:,.1f} ms"),
        ("tokens/s of the slice, at most", f"{report.tokens / times.step:,.0f}"),
        ("model FLOPs utilisation, at most (masked scores count)", f"{report.utilisation:.1%}"),
        ("compiled in", f"{report.compile_seconds:.0f} s"),
    ]
    if costs.uncounted_kernels:
        rows.append(("kernels whose FLOPs are not known", ", ".join(costs.uncounted_kernels)))
    for row in rows:
        table.add_row(*row)
    return table
