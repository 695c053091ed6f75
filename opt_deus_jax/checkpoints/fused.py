"""Kernels that a checkpoint stores otherwise than the project knows them: as one, or in pieces.

Of fused kernels the project knows the parts only: they are cut out where a checkpoint is read, and
put together where one is written. Of experts it is the other way round.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from opt_deus_jax.checkpoints.experts import expert_names, stack_experts, unstack_experts
from opt_deus_jax.checkpoints.source import CheckpointSource, TensorInfo
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.params import fused_names, named_tensors

Read = Callable[[str], np.ndarray]


def split_fused(source: CheckpointSource, config: ModelConfig) -> CheckpointSource:
    """Shows the parts of fused kernels as tensors of their own, and experts as one.

    Args:
        source: A checkpoint as it is stored.
        config: Its network.

    Returns:
        The same tensors by the names of `named_tensors`; the source itself where none is stored
        otherwise.

    Raises:
        UserError: A fused kernel or an expert is missing or of another shape, or parts are there as
            well.
    """
    source = stack_experts(source, config)
    wholes = fused_names(config)
    if not wholes:
        return source
    shapes = {name: spec.shape for name, spec in named_tensors(config, config.num_layers)}
    tensors = {name: info for name, info in source.tensors.items() if name not in wholes}
    places: dict[str, tuple[str, int, int]] = {}
    for whole, parts in wholes.items():
        if whole not in source.tensors:
            raise UserError(
                f"{source.name}: misses tensor {whole}; it does not match its config.json, fetch "
                "it again"
            )
        info = source.tensors[whole]
        expected = (sum(shapes[part][0] for part in parts), shapes[parts[0]][1])
        if info.shape != expected:
            raise UserError(
                f"{source.name}: tensor {whole} has shape {info.shape}, config.json asks for "
                f"{expected}; one of the two is of another model"
            )
        first = 0
        for part in parts:
            if part in tensors:
                raise UserError(
                    f"{source.name}: has unknown tensor {part} beside {whole}; it does not match "
                    "its config.json, fetch it again"
                )
            tensors[part] = TensorInfo(shapes[part], info.dtype)
            places[part] = (whole, first, first + shapes[part][0])
            first += shapes[part][0]

    def read_slice(name: str, index: tuple[slice, ...]) -> np.ndarray:
        if name not in places:
            return source.read_part(name, index)
        whole, first, last = places[name]
        rows, *columns = index
        start, stop, _ = rows.indices(last - first)
        return source.read_part(whole, (slice(first + start, first + stop), *columns))

    def read(name: str) -> np.ndarray:
        return read_slice(name, (slice(None), slice(None))) if name in places else source.read(name)

    return dataclasses.replace(source, tensors=tensors, read=read, read_slice=read_slice)


def parts_of_stored(
    tensors: Mapping[str, TensorInfo], config: ModelConfig, num_layers: int
) -> dict[str, list[str]]:
    """Of which tensors each is made that `fuse` stores.

    Args:
        tensors: Every tensor by the names of `named_tensors`, in the order of writing.
        config: The network.
        num_layers: The depth of what is written.

    Returns:
        Names of `tensors` by that of what is stored.
    """
    wholes = fused_names(config, num_layers)
    whole_of = {part: whole for whole, parts in wholes.items() for part in parts}
    made_of: dict[str, list[str]] = {}
    for name, info in tensors.items():
        for stored in expert_names(name, info.shape[0]):
            made_of.setdefault(whole_of.get(stored, stored), []).append(name)
    return made_of


def fuse(
    tensors: Mapping[str, TensorInfo], read: Read, config: ModelConfig, num_layers: int
) -> tuple[list[tuple[str, TensorInfo]], Read]:
    """Undoes `split_fused` for writing.

    Args:
        tensors: Every tensor by the names of `named_tensors`, in the order of writing.
        read: Makes or reads one of them.
        config: The network.
        num_layers: The depth of what is written.

    Returns:
        What is stored, a fused kernel in the place of the first of its parts, and how one of those
        is made.
    """
    tensors, read = unstack_experts(tensors, read)
    wholes = fused_names(config, num_layers)
    whole_of = {part: whole for whole, parts in wholes.items() for part in parts}
    stored: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        whole = whole_of.get(name, name)
        if whole not in stored:
            infos = [tensors[part] for part in wholes.get(whole, (name,))]
            shape = (sum(part.shape[0] for part in infos), *info.shape[1:])
            stored[whole] = TensorInfo(shape, info.dtype)

    def read_stored(name: str) -> np.ndarray:
        if name not in wholes:
            return read(name)
        return np.concatenate([read(part) for part in wholes[name]])

    return list(stored.items()), read_stored
