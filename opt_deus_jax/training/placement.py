"""Where everything that a training touches lives on the mesh."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from opt_deus_jax.config import TrainingConfig
from opt_deus_jax.distributed.sharding import RULES, named_sharding, num_shards
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.language_model import Params
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.params import ParamSpec, block_specs, outer_specs
from opt_deus_jax.training.segments import Segment, partition, pattern_specs


class Placement(NamedTuple):
    """Shardings, each tree with the structure of what it places.

    Attributes:
        trainable: Of the trained parameters, None for frozen ones.
        frozen: Of the rest.
        optimizer_state: Of the optimizer's state.
        rows: Of an array [batch, ...] of sequences.
        scalar: Of what every device holds.
    """

    trainable: Any
    frozen: Any
    optimizer_state: Any
    rows: NamedSharding
    scalar: NamedSharding


def param_shardings(config: ModelConfig, segments: Sequence[Segment], mesh: Mesh) -> Params:
    """The sharding of every leaf of a param pytree.

    Args:
        config: The network.
        segments: How its blocks are stacked.
        mesh: The mesh.

    Returns:
        A param pytree of shardings.
    """
    tree: dict[str, Any] = {
        name: named_sharding(mesh, *spec.logical_axes) for name, spec in outer_specs(config).items()
    }
    tree["segments"] = [
        [
            {name: named_sharding(mesh, "layers", *s.logical_axes) for name, s in specs.items()}
            for specs in pattern
        ]
        for pattern in pattern_specs(config, segments)
    ]
    return tree


def abstract_params(
    config: ModelConfig, segments: Sequence[Segment], dtype: np.dtype, shardings: Any
) -> Params:
    """Shape, dtype and sharding of every leaf of a param pytree.

    Args:
        config: The network.
        segments: How its blocks are stacked.
        dtype: Type of the leaves.
        shardings: A tree like the param pytree, as from `param_shardings`, or a prefix of one.

    Returns:
        A param pytree of `jax.ShapeDtypeStruct`.
    """
    tree: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(spec.shape, dtype) for name, spec in outer_specs(config).items()
    }
    tree["segments"] = [
        [
            {
                name: jax.ShapeDtypeStruct((segment.repeats, *spec.shape), dtype)
                for name, spec in specs.items()
            }
            for specs in pattern
        ]
        for segment, pattern in zip(segments, pattern_specs(config, segments), strict=True)
    ]
    return jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding),
        tree,
        jax.tree.broadcast(shardings, tree),
    )


def place(
    config: ModelConfig,
    segments: Sequence[Segment],
    mask: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> Placement:
    """Places a training on a mesh.

    Args:
        config: The network.
        segments: How its blocks are stacked.
        mask: From `trained_mask`.
        optimizer: The optimizer; its state for a parameter lies where the parameter lies.
        mesh: The mesh.

    Returns:
        The shardings.
    """
    shardings, scalar = param_shardings(config, segments, mesh), named_sharding(mesh)
    trainable, frozen = partition(shardings, mask)
    abstract, _ = partition(
        abstract_params(config, segments, np.dtype(np.float32), shardings), mask
    )
    optimizer_state = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, abstract),
        trainable,
        transform_non_params=lambda _: scalar,
    )
    return Placement(trainable, frozen, optimizer_state, named_sharding(mesh, "batch"), scalar)


def local_rows(rows: NamedSharding, batch_size: int) -> tuple[int, ...]:
    """The rows of a batch that the devices of this process hold.

    Args:
        rows: The sharding of the rows.
        batch_size: Rows of the whole batch.

    Returns:
        Their numbers, ascending.
    """
    held: set[int] = set()
    for index in rows.addressable_devices_indices_map((batch_size,)).values():
        assert index is not None
        held.update(range(*index[0].indices(batch_size)))
    return tuple(sorted(held))


def put_rows(
    columns: Mapping[str, np.ndarray], numbers: Sequence[int], batch_size: int, rows: NamedSharding
) -> dict[str, jax.Array]:
    """Makes global arrays from the rows that each process has.

    Args:
        columns: Arrays [len(numbers), ...].
        numbers: Which rows of the batch those are, ascending: at least `local_rows`.
        batch_size: Rows of the whole batch.
        rows: The sharding of the rows.

    Returns:
        Arrays [batch_size, ...].
    """

    def put(column: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            first, last, _ = index[0].indices(batch_size)
            return column[np.searchsorted(numbers, range(first, last))]

        return jax.make_array_from_callback((batch_size, *column.shape[1:]), rows, part)

    return {name: put(column) for name, column in columns.items()}


def check_fits(config: ModelConfig, training: TrainingConfig, mesh: Mesh) -> None:
    """Checks that every parameter and every batch can be cut evenly.

    Args:
        config: The network.
        training: The settings of the batch.
        mesh: The mesh.

    Raises:
        UserError: An axis of the mesh does not divide what it cuts.
    """
    specs: list[ParamSpec] = [*outer_specs(config).values()]
    for kind in set(config.layer_kinds):
        specs += block_specs(config, kind).values()
    sizes = {
        axis: size
        for spec in specs
        for axis, size in zip(spec.logical_axes, spec.shape, strict=True)
    }
    # A head of queries is never cut; one of keys may be.
    sizes["heads"] = config.num_heads
    for axis, size in sizes.items():
        if size % num_shards(axis, mesh):
            raise UserError(
                f"config field mesh.{RULES[axis]}={num_shards(axis, mesh)}: does not divide the "
                f"{size} of the model's {axis}; use a divisor of it"
            )
    shards = num_shards("batch", mesh)
    part = training.batch_size // training.accumulation_steps
    if part % shards:
        raise UserError(
            f"config field training.batch_size={training.batch_size}: each of its "
            f"{training.accumulation_steps} parts has {part} sequences, which the mesh spreads "
            f"over data x fsdp = {shards} devices; use a multiple of "
            f"{shards * training.accumulation_steps}"
        )
