"""How often each computation of a compiled program is run."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from opt_deus_jax.distributed.hlo_text import Computation, HloModule, Instruction

_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_KNOWN = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')


class _Call(NamedTuple):
    """A computation as it is reached: its parameters stand for what the caller passes."""

    computation: Computation
    operands: tuple[str, ...]
    caller: "_Call | None"


def _resolve(call: _Call, name: str) -> int | None:
    """The integer that an instruction always yields, None where it is not known."""
    instruction = call.computation.instructions[name]
    opcode = instruction.opcode
    if opcode == "constant":
        return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None
    if opcode in ("copy", "bitcast", "convert"):
        return _resolve(call, instruction.operands[0])
    if opcode == "parameter" and call.caller is not None and len(call.computation.parameters) > 1:
        return _resolve(call.caller, call.operands[int(instruction.literal)])
    if opcode != "get-tuple-element":
        return None
    source = call.computation.instructions[instruction.operands[0]]
    element = _element(instruction)
    if source.opcode == "tuple":
        return _resolve(call, source.operands[element])
    if source.opcode != "parameter" or call.caller is None or not _is_kept(call, element):
        return None
    given = call.caller.computation.instructions[call.operands[0]]
    return _resolve(call.caller, given.operands[element]) if given.opcode == "tuple" else None


def _element(instruction: Instruction) -> int:
    found = re.search(r"\bindex=(\d+)", instruction.attributes)
    assert found is not None
    return int(found[1])


def _is_kept(call: _Call, element: int) -> bool:
    """Whether the body of a loop hands an element of its state on unchanged."""
    instructions = call.computation.instructions
    root = instructions[call.computation.root]
    if root.opcode != "tuple":
        return False
    kept = instructions[root.operands[element]]
    return (
        kept.opcode == "get-tuple-element"
        and instructions[kept.operands[0]].opcode == "parameter"
        and _element(kept) == element
    )


def _turns(module: HloModule, call: _Call, loop: Instruction) -> int:
    """How often a loop that counts up to a constant turns."""
    known = _KNOWN.search(loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations[loop.called("condition") or ""]
    body = _Call(module.computations[loop.called("body") or ""], loop.operands, call)
    compare = condition.instructions[condition.root]
    counter = condition.instructions[compare.operands[0]] if compare.operands else compare
    if (
        compare.opcode != "compare"
        or "direction=LT" not in compare.attributes
        or counter.opcode != "get-tuple-element"
    ):
        raise ValueError(f"loop {loop.name} of the compiled program does not count up")
    element = _element(counter)
    limit = _resolve(_Call(condition, (), None), compare.operands[1])
    state = call.computation.instructions[loop.operands[0]]
    first = _resolve(call, state.operands[element]) if state.opcode == "tuple" else None
    instructions = body.computation.instructions
    advance = instructions[instructions[body.computation.root].operands[element]]
    steps = [_resolve(body, name) for name in advance.operands]
    step = next((value for value in steps if value is not None), None)
    if advance.opcode != "add" or limit is None or first is None or not step:
        raise ValueError(
            f"loop {loop.name} of the compiled program has no constant number of turns"
        )
    return max(0, -(-(limit - first) // step))


def _reached(module: HloModule, call: _Call, times: int) -> Iterator[tuple[Computation, int]]:
    yield call.computation, times
    for instruction in call.computation.instructions.values():
        called, turns = [], 1
        if instruction.opcode == "while":
            called, turns = [instruction.called("body")], _turns(module, call, instruction)
        elif instruction.opcode == "call":
            called = [instruction.called("to_apply")]
        elif instruction.opcode == "async-start":
            called = [instruction.called("calls")]
        elif instruction.opcode == "conditional":
            branches = _BRANCHES.search(instruction.attributes)
            names = branches[1].split(",") if branches else []
            called = [name.strip().lstrip("%") for name in names] or [
                instruction.called("true_computation"),
                instruction.called("false_computation"),
            ]
        for name in called:
            inner = _Call(module.computations[name or ""], instruction.operands, call)
            yield from _reached(module, inner, times * turns)


def executions(module: HloModule) -> Iterator[tuple[Computation, int]]:
    """Every computation that a run of the program schedules, with how often it is run.

    Fused computations belong to the instruction that calls them and are not listed; of a
    conditional every branch is taken to be run.

    Args:
        module: The program.

    Yields:
        (computation, times); a computation that is called from several places comes several times.

    Raises:
        ValueError: The number of turns of a loop is not constant, or cannot be read.
    """
    yield from _reached(module, _Call(module.computations[module.entry], (), None), 1)
