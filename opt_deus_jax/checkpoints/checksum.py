"""Fingerprints by which damage to a checkpoint is found."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Scatters the bits, one to one: the finalizer of MurmurHash3."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _sum(part: Shaped[Array, "..."], place: Array) -> UInt32[Array, ""]:
    """Of the part of an array behind a place on its first axes."""
    bits = jnp.dtype(part.dtype).itemsize * 8
    if bits > 32:
        raise ValueError(f"a checksum is for numbers of at most 32 bits, not {part.dtype}")
    unsigned = jax.lax.bitcast_convert_type(part, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)
    places = jnp.full(part.shape, place, jnp.uint32)
    for axis, size in enumerate(part.shape):
        places = places * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, part.shape, axis)
    return jnp.sum(_mix(unsigned + places * np.uint32(0x9E3779B1)), dtype=jnp.uint32)


def _checksum(leaf: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    zero = jnp.zeros((), jnp.uint32)
    if leaf.ndim < 3:
        return _sum(leaf, zero)

    # Kernels are stacked by layer and not cut along it. One after the other stays in the cache,
    # and XLA on a CPU would write out all scattered bits before it adds them up.
    def add(layer: Array, total: Array) -> Array:
        kernel = jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
        return total + _sum(kernel, layer.astype(jnp.uint32))

    return jax.lax.fori_loop(0, leaf.shape[0], add, zero)


@jax.jit
def _checksums(leaves: list[Array]) -> list[Array]:
    return [_checksum(leaf) for leaf in leaves]


def tree_checksums(tree: Any) -> dict[str, int]:
    """Checksums of all leaves, computed where they lie, in one pass over them.

    Each is the sum, modulo 2**32, of the numbers' bits, scattered one to one in a way that depends
    on the place. A change within one number thus always shows, others but for a chance of 2**-32.
    Integers add up alike in any order, so the checksum is that of the content, however the array
    is spread over devices and processes.

    Args:
        tree: Pytree of arrays of at most 32 bits a number; all processes give their part.

    Returns:
        Checksums by the path of the leaf, the same on all processes.
    """
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    sums = jax.device_get(_checksums(list(leaves)))
    return {jax.tree_util.keystr(p): int(s) for p, s in zip(paths, sums, strict=True)}


def json_checksum(content: Any) -> str:
    """sha256, in hexadecimal, of the one way to write some JSON."""
    written = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(written.encode()).hexdigest()
