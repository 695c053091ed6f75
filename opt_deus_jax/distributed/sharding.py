"""Which mesh axis each axis of an array is cut along: one table for parameters and activations."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# None: every device holds the whole axis.
RULES: dict[str, tuple[str, ...] | str | None] = {
    "vocabulary": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    # Each device has some experts, whole.
    "expert": "tensor",
    "expert_mlp": None,
    "all_experts": None,
    "width": "fsdp",
    "layers": None,
    "accumulation": None,
    "batch": ("data", "fsdp"),
    # Looked up with the sequences of a data group whole: the embedding then stays cut by width.
    "lookup_batch": "data",
    "all_rows": None,
    "length": None,
    "all_kv_heads": None,
    "gathered_width": None,
    "head_dim": None,
}


def partition_spec(logical_axes: Sequence[str]) -> PartitionSpec:
    """Translates logical axes by `RULES`.

    Args:
        logical_axes: A name for each axis of an array.

    Returns:
        The mesh axes of each.

    Raises:
        ValueError: A name is unknown, or two axes would be cut along the same mesh axis.
    """
    for axis in logical_axes:
        if axis not in RULES:
            raise ValueError(f"logical axis {axis!r} has no rule; add it to RULES")
    entries = [RULES[axis] for axis in logical_axes]
    used = [name for entry in entries for name in _names(entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(logical_axes)} collide on a mesh axis: {entries}")
    return PartitionSpec(*entries)


def _names(entry: tuple[str, ...] | str | None) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else entry


def named_sharding(mesh: Mesh, *logical_axes: str) -> NamedSharding:
    """The sharding of an array with these axes; of a scalar where none are given."""
    return NamedSharding(mesh, partition_spec(logical_axes))


def num_shards(logical_axis: str, mesh: Any = None) -> int:
    """Into how many parts an axis is cut.

    Args:
        logical_axis: Its name.
        mesh: A mesh; None takes that of the surrounding `jax.set_mesh`, if there is one.

    Returns:
        1 without a mesh.
    """
    sizes = dict((jax.sharding.get_abstract_mesh() if mesh is None else mesh).shape)
    shards = 1
    for name in _names(RULES[logical_axis]):
        shards *= sizes.get(name, 1)
    return shards


def constrain(x: jax.Array, *logical_axes: str) -> jax.Array:
    """Fixes how an array is spread over the mesh of the surrounding `jax.set_mesh`.

    Args:
        x: An array inside jit.
        logical_axes: A name for each of its axes.

    Returns:
        The same values; without a mesh the same array.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(logical_axes))


def gather_width(kernel: jax.Array, logical_axes: tuple[str, ...]) -> jax.Array:
    """Collects a kernel that is cut by width, just before it is multiplied with.

    Its gradient goes back to the cut: each device sums only its own part.

    Args:
        kernel: A parameter in the dtype in which it is to travel.
        logical_axes: Those of its spec.

    Returns:
        The same values, whole along "width" and still cut along the other axes.
    """
    return _gather_width(kernel, logical_axes)  # pyright: ignore[reportReturnType]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_width(kernel: jax.Array, logical_axes: tuple[str, ...]) -> jax.Array:
    gathered = ("gathered_width" if axis == "width" else axis for axis in logical_axes)
    return constrain(kernel, *gathered)


def _forward(kernel: jax.Array, logical_axes: tuple[str, ...]) -> tuple[jax.Array, None]:
    return gather_width(kernel, logical_axes), None


def _backward(logical_axes: tuple[str, ...], _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (constrain(gradient, *logical_axes),)


_gather_width.defvjp(_forward, _backward)
