"""The text of a compiled XLA program as data."""

import dataclasses
import math
import re
from collections.abc import Mapping

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_BITS = re.compile(r"[a-z]+(\d+)")


@dataclasses.dataclass(frozen=True)
class HloArray:
    """An array of a compiled program.

    Attributes:
        dtype: As HLO writes it, such as bf16.
        shape: Its sizes on one device.
        in_main_memory: False where the layout puts it into on-chip memory.
    """

    dtype: str
    shape: tuple[int, ...]
    in_main_memory: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes without the padding of tiles."""
        bits = _BITS.match(self.dtype)
        return self.size * int(bits[1]) // 8 if bits else self.size


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: Its name, unique in its computation.
        opcode: What it does, such as `fusion`.
        arrays: Its output, a tuple flattened.
        operands: Names of its inputs.
        literal: What stands between its parentheses.
        attributes: What stands after them.
    """

    name: str
    opcode: str
    arrays: tuple[HloArray, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str

    @property
    def num_bytes(self) -> int:
        """Bytes of its output, in whatever memory."""
        return sum(array.num_bytes for array in self.arrays)

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute such as `body` names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the program.

    Attributes:
        instructions: By name, in order.
        root: The name of the one whose output is returned.
        parameters: Names, by number.
    """

    instructions: Mapping[str, Instruction]
    root: str
    parameters: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class HloModule:
    """A program.

    Attributes:
        computations: By name.
        entry: The name of the one that is run.
    """

    computations: Mapping[str, Computation]
    entry: str


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in HLO: {text[:200]}")


def _parse_instruction(line: str) -> tuple[Instruction, bool]:
    head = _INSTRUCTION.match(line)
    assert head is not None
    start = head.end()
    # A type is one word, or a tuple in parentheses.
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    arrays = tuple(
        HloArray(
            dtype,
            tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size),
            re.search(r"S\([1-9]", layout) is None,
        )
        for dtype, sizes, layout in _ARRAY.findall(line[start:end])
    )
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        raise ValueError(f"no opcode in HLO: {line[:200]}")
    closing = _closing(line, opcode.end() - 1)
    literal = line[opcode.end() : closing]
    return (
        Instruction(
            head[2],
            opcode[1],
            arrays,
            tuple(_OPERAND.findall(literal)),
            literal,
            line[closing + 1 :],
        ),
        head[1] is not None,
    )


def _parse_computation(lines: list[str]) -> Computation:
    instructions: dict[str, Instruction] = {}
    parameters: dict[int, str] = {}
    root = ""
    for line in lines:
        instruction, is_root = _parse_instruction(line)
        instructions[instruction.name] = instruction
        if instruction.opcode == "parameter":
            parameters[int(instruction.literal)] = instruction.name
        if is_root:
            root = instruction.name
    return Computation(instructions, root, tuple(parameters[i] for i in sorted(parameters)))


def parse_hlo(text: str) -> HloModule:
    """Reads the text of a compiled program.

    Args:
        text: `jax.stages.Compiled.as_text()`, of any backend.

    Returns:
        Its computations.

    Raises:
        ValueError: The text is not of that form.
    """
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            head = _COMPUTATION.match(line)
            if head:
                current = bodies.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
        elif line == "}":
            current = None
        elif _INSTRUCTION.match(line):
            current.append(line)
        elif current:
            # Metadata of a kernel may hold line breaks.
            current[-1] += line
    if not entry:
        raise ValueError("the HLO text has no entry computation")
    return HloModule({name: _parse_computation(lines) for name, lines in bodies.items()}, entry)
