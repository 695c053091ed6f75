"""Experts that a checkpoint stores one by one, seen as one stack."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from opt_deus_jax.checkpoints.source import CheckpointSource, TensorInfo
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.params import named_tensors

Read = Callable[[str], np.ndarray]
# In the name of a stack; in that of an expert there is its number.
_ANY = "*"


def expert_names(name: str, number: int) -> list[str]:
    """The names under which a tensor is stored: a stack of so many experts has one for each."""
    return [name.replace(_ANY, str(expert)) for expert in range(number)] if _ANY in name else [name]


def stack_experts(source: CheckpointSource, config: ModelConfig) -> CheckpointSource:
    """Shows the tensors of all experts of a layer as one.

    Args:
        source: A checkpoint as it is stored.
        config: Its network.

    Returns:
        The same tensors, stacks by the names of `named_tensors`; the source itself where there are
        no experts. A part of a stack is read from the experts that it has rows of.

    Raises:
        UserError: An expert is missing or of another shape or dtype than the others.
    """
    stacks = {
        name: (spec.shape, expert_names(name, spec.shape[0]))
        for name, spec in named_tensors(config, config.num_layers)
        if _ANY in name
    }
    if not stacks:
        return source
    tensors = dict(source.tensors)
    for stack, (shape, names) in stacks.items():
        infos = [_pop_expert(source, tensors, name, shape[1:]) for name in names]
        dtypes = {info.dtype for info in infos}
        if len(dtypes) > 1:
            raise UserError(
                f"{source.name}: tensors {stack} have several dtypes, "
                f"{', '.join(sorted(map(str, dtypes)))}; use a checkpoint of one"
            )
        tensors[stack] = TensorInfo(shape, infos[0].dtype)

    def read_slice(name: str, index: tuple[slice, ...]) -> np.ndarray:
        if name not in stacks:
            return source.read_part(name, index)
        chosen = stacks[name][1][index[0]]
        return np.stack([source.read_part(expert, index[1:]) for expert in chosen])

    def read(name: str) -> np.ndarray:
        if name not in stacks:
            return source.read(name)
        return np.stack([source.read(expert) for expert in stacks[name][1]])

    return dataclasses.replace(source, tensors=tensors, read=read, read_slice=read_slice)


def _pop_expert(
    source: CheckpointSource,
    tensors: dict[str, TensorInfo],
    name: str,
    expected: tuple[int, ...],
) -> TensorInfo:
    if name not in tensors:
        raise UserError(
            f"{source.name}: misses tensor {name}; it does not match its config.json, fetch it "
            "again"
        )
    info = tensors.pop(name)
    if info.shape != expected:
        raise UserError(
            f"{source.name}: tensor {name} has shape {info.shape}, config.json asks for "
            f"{expected}; one of the two is of another model"
        )
    return info


def unstack_experts(
    tensors: Mapping[str, TensorInfo], read: Read
) -> tuple[dict[str, TensorInfo], Read]:
    """Undoes `stack_experts` for writing.

    Args:
        tensors: Every tensor by the names of `named_tensors`, in the order of writing.
        read: Makes or reads one of them.

    Returns:
        What is stored, experts in the place of their stack, and how one of them is made. The last
        stack stays in memory.
    """
    stored: dict[str, TensorInfo] = {}
    place_of: dict[str, tuple[str, int]] = {}
    for name, info in tensors.items():
        if _ANY not in name:
            stored[name] = info
            continue
        for expert, expert_name in enumerate(expert_names(name, info.shape[0])):
            stored[expert_name] = TensorInfo(info.shape[1:], info.dtype)
            place_of[expert_name] = (name, expert)
    held: dict[str, np.ndarray] = {}

    def read_stored(name: str) -> np.ndarray:
        if name not in place_of:
            held.clear()
            return read(name)
        stack, expert = place_of[name]
        if stack not in held:
            held.clear()
            held[stack] = read(stack)
        return held[stack][expert]

    return stored, read_stored
