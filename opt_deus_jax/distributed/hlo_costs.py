"""What a compiled program computes and moves on one device, loops included.

XLA's own `cost_analysis` counts the body of a loop once and a Pallas kernel as nothing, so a
network whose layers are scanned over would look as if it had one layer.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

from opt_deus_jax.distributed.hlo_text import Computation, HloArray, HloModule, Instruction
from opt_deus_jax.distributed.hlo_trips import executions

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Operations that name or reshape arrays, or whose cost is that of the computations they call.
_FREE = frozenset(
    {
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "partition-id",
        "replica-id",
        "opt-barrier",
    }
)
# Products of one query with one key that each kernel of JAX's splash attention makes.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


@dataclasses.dataclass(frozen=True)
class Collective:
    """The collectives of one kind in one run of a program.

    Attributes:
        count: How many are run.
        num_bytes: Bytes that a device receives in all of them.
    """

    count: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class HloCosts:
    """One run of a program on one device.

    Attributes:
        flops: Of matrix products, grouped ones and splash attention (a multiply-add is 2),
            recomputation included. Where other devices have some of the experts, a grouped product
            skips the rows that are sent to those, which a program does not say; all are counted.
        hbm_bytes: Read from and written to main memory between fusions.
        collectives: By kind.
        uncounted_kernels: Names of kernels whose operations are not in `flops`.
    """

    flops: int
    hbm_bytes: int
    collectives: dict[str, Collective]
    uncounted_kernels: tuple[str, ...]


def _dimensions(instruction: Instruction, attribute: str) -> list[int]:
    found = re.search(rf"\b{attribute}={{([\d,]*)}}", instruction.attributes)
    return [int(axis) for axis in found[1].split(",") if axis] if found else []


def _window(instruction: Instruction, key: str, rank: int, default: str) -> list[str]:
    found = re.search(rf"window={{[^}}]*\b{key}=([\dx_\-]+)", instruction.attributes)
    return found[1].split("x") if found else [default] * rank


def _valid_positions(size: int, kernel: int, output: int, stride: int, low: int, dilations) -> int:  # noqa: ANN001
    """Pairs of an output and a kernel position that meet an element and not padding."""
    base, window = dilations
    reach = (size - 1) * base + 1
    return sum(
        0 <= place < reach and place % base == 0
        for o, k in itertools.product(range(output), range(kernel))
        for place in [o * stride + k * window - low]
    )


def _convolution_flops(instruction: Instruction, lhs: HloArray, rhs: HloArray) -> int:
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if found is None:
        raise ValueError(f"convolution without dim_labels: {instruction.name}")
    left, right, out = found.groups()
    spatial = sorted(label for label in out if label.isdigit())
    rank = len(spatial)
    strides = _window(instruction, "stride", rank, "1")
    pads = _window(instruction, "pad", rank, "0_0")
    bases = _window(instruction, "lhs_dilate", rank, "1")
    windows = _window(instruction, "rhs_dilate", rank, "1")
    output = instruction.arrays[0].shape
    flops = 2 * output[out.index("b")] * output[out.index("f")] * rhs.shape[right.index("i")]
    for i, label in enumerate(spatial):
        flops *= _valid_positions(
            lhs.shape[left.index(label)],
            rhs.shape[right.index(label)],
            output[out.index(label)],
            int(strides[i]),
            int(pads[i].split("_")[0]),
            (int(bases[i]), int(windows[i])),
        )
    return flops


def _splash_flops(instruction: Instruction, arrays: list[HloArray]) -> int | None:
    kind = re.match(r"splash_mha_(fwd|dq|dkv)", instruction.name)
    block = re.search(r'block_q(?:_dkv|_dq)?\\?": (\d+)', instruction.attributes)
    if kind is None or block is None:
        return None
    # After the integers that say which blocks to visit come queries: [batch, heads, length, head],
    # or without a batch where it is one sequence.
    *rows, length, head_dim = next(a.shape for a in arrays if a.dtype in ("bf16", "f32"))
    # Blocks above the diagonal are skipped, those on it computed whole.
    pairs = length * (length + int(block[1])) // 2
    return 2 * _SPLASH_PRODUCTS[kind[1]] * math.prod(rows) * pairs * head_dim


def _kernel_flops(instruction: Instruction, arrays: list[HloArray]) -> int | None:
    """FLOPs of a kernel for TPU; of a grouped product as if each of its rows were in a group."""
    if instruction.name.startswith("ragged-dot-metadata"):
        return 0
    if instruction.name.startswith("ragged-dot"):
        # The rows come before the kernels of all groups.
        return 2 * instruction.arrays[0].size * arrays[-2].shape[-1]
    if instruction.name.startswith("tgmm"):
        # Of each group, the rows of one times those of the other.
        return 2 * arrays[-2].size * arrays[-1].shape[-1]
    return _splash_flops(instruction, arrays)


def _flops(module: HloModule, computation: Computation, instruction: Instruction) -> int | None:
    """FLOPs of one instruction, None for a kernel that is not known."""
    arrays = [a for name in instruction.operands for a in computation.instructions[name].arrays]
    if instruction.opcode == "dot":
        contracted = _dimensions(instruction, "lhs_contracting_dims")
        return 2 * instruction.arrays[0].size * math.prod(arrays[0].shape[i] for i in contracted)
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, arrays[0], arrays[1])
    if instruction.opcode == "fusion":
        fused = module.computations[instruction.called("calls") or ""]
        return sum(_flops(module, fused, inner) or 0 for inner in fused.instructions.values())
    if instruction.opcode == "custom-call" and "tpu_custom_call" in instruction.attributes:
        return _kernel_flops(instruction, arrays)
    return 0


def _read(module: HloModule, computation: Computation, name: str, array: HloArray) -> int:
    """Bytes of a fusion's input that are read, where only slices of it are."""
    total = 0
    for user in computation.instructions.values():
        for place, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.opcode == "bitcast":
                total += _read(module, computation, user.name, array)
            elif user.opcode in ("dynamic-slice", "slice"):
                total += user.num_bytes if place == 0 else 0
            elif user.opcode == "fusion":
                inner = module.computations[user.called("calls") or ""]
                total += _read(module, inner, inner.parameters[place], array)
            elif user.opcode != "dynamic-update-slice" or place != 0:
                return array.num_bytes
    return min(total, array.num_bytes)


def _written(module: HloModule, computation: Computation, name: str) -> list[int]:
    """Bytes of each output of a fusion that are written, where some are updated in place."""
    root = computation.instructions[name]
    if root.opcode == "tuple":
        return [n for part in root.operands for n in _written(module, computation, part)]
    if root.opcode == "bitcast":
        return _written(module, computation, root.operands[0])
    if root.opcode == "dynamic-update-slice":
        return [computation.instructions[root.operands[1]].num_bytes]
    if root.opcode == "fusion":
        inner = module.computations[root.called("calls") or ""]
        return _written(module, inner, inner.root)
    if root.opcode == "parameter":
        return [0]
    return [array.num_bytes for array in root.arrays]


def _hbm_bytes(module: HloModule, computation: Computation, instruction: Instruction) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or "AllocateBuffer" in instruction.attributes:
        return 0
    if opcode.endswith("-start"):
        # Its output lists source and destination both.
        return sum(array.num_bytes for array in instruction.arrays if array.in_main_memory)
    inputs = [computation.instructions[name].arrays for name in instruction.operands]
    if opcode == "fusion":
        fused = module.computations[instruction.called("calls") or ""]
        read = [
            _read(module, fused, parameter, arrays[0])
            for parameter, arrays in zip(fused.parameters, inputs, strict=True)
        ]
        written = _written(module, fused, fused.root)
    elif opcode in ("dynamic-slice", "slice"):
        read, written = [instruction.num_bytes], [instruction.num_bytes]
    elif opcode == "dynamic-update-slice":
        update = inputs[1][0].num_bytes
        return 2 * update if instruction.arrays[0].in_main_memory else 0
    else:
        read = [array.num_bytes for arrays in inputs for array in arrays]
        written = [array.num_bytes for array in instruction.arrays]
        inputs = [(array,) for arrays in inputs for array in arrays]
    return sum(
        n for n, arrays in zip(read, inputs, strict=False) if arrays[0].in_main_memory
    ) + sum(n for n, array in zip(written, instruction.arrays, strict=True) if array.in_main_memory)


def _group_size(attributes: str) -> int:
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if counted:
        return int(counted[1])
    if listed:
        return len(listed[1].split(","))
    raise ValueError(f"unknown replica_groups in HLO: {attributes[:200]}")


def _received(computation: Computation, instruction: Instruction) -> tuple[str, int] | None:
    """Kind of a collective and the bytes that a device receives; None for anything else."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    sent = sum(computation.instructions[name].num_bytes for name in instruction.operands)
    if kind in ("collective-permute", "collective-broadcast"):
        return kind, sent
    others = _group_size(instruction.attributes) - 1
    if kind == "all-gather":
        return kind, sent * others
    if kind == "all-reduce":
        return kind, 2 * sent * others // (others + 1)
    return kind, sent * others // (others + 1)


def _collectives(module: HloModule, computation: Computation) -> Iterator[tuple[str, int]]:
    """(kind, bytes that a device receives) of every collective of a computation."""
    channels: set[str] = set()
    for instruction in computation.instructions.values():
        found = _received(computation, instruction)
        if found is not None:
            yield found
        if instruction.opcode != "fusion":
            continue
        inner = module.computations[instruction.called("calls") or ""]
        for part in inner.instructions.values():
            found = _received(inner, part)
            channel = re.search(r"channel_id=(\d+)", part.attributes)
            # A TPU starts a collective in one fusion and ends it in another, on the same channel.
            if found is None or (channel and channel[1] in channels):
                continue
            if channel:
                channels.add(channel[1])
            kind, received = found
            # An all-reduce of which each device keeps a slice is a reduce-scatter.
            written = sum(_written(module, inner, inner.root))
            if kind == "all-reduce" and written < part.num_bytes:
                kind, received = "reduce-scatter", received // 2
            yield kind, received


def count_hlo(module: HloModule) -> HloCosts:
    """Counts one run of a program on one device.

    Args:
        module: The program.

    Returns:
        The counts.

    Raises:
        ValueError: A loop's number of turns, or the devices of a collective, cannot be read.
    """
    flops = hbm_bytes = 0
    collectives: dict[str, Collective] = {}
    uncounted: list[str] = []
    for computation, times in executions(module):
        for instruction in computation.instructions.values():
            counted = _flops(module, computation, instruction)
            if counted is None:
                uncounted.append(instruction.name)
            flops += times * (counted or 0)
            hbm_bytes += times * _hbm_bytes(module, computation, instruction)
        for kind, received in _collectives(module, computation):
            before = collectives.get(kind, Collective(0, 0))
            collectives[kind] = Collective(
                before.count + times, before.num_bytes + times * received
            )
    return HloCosts(flops, hbm_bytes, collectives, tuple(uncounted))
