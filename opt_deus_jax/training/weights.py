"""Between a checkpoint's named tensors and the stacked leaves of a param pytree."""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.language_model import Params
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.params import named_tensors, outer_specs
from opt_deus_jax.training.segments import Segment, depth_of, pattern_specs


def hf_names(config: ModelConfig, segments: Sequence[Segment]) -> dict[str, Any]:
    """Names the tensors of every leaf of a param pytree.

    Args:
        config: The network.
        segments: How its blocks are stacked.

    Returns:
        A param pytree whose leaves, which `is_names` tells, are a Hugging Face name or, for a
        stack, one for each of its rows.
    """
    names: dict[str, Any] = {name: spec.hf_name for name, spec in outer_specs(config).items()}
    names["segments"] = [
        [
            {
                name: [
                    spec.hf_name.format(layer=depth_of(segment, repeat, place))
                    for repeat in range(segment.repeats)
                ]
                for name, spec in specs.items()
            }
            for place, specs in enumerate(pattern)
        ]
        for segment, pattern in zip(segments, pattern_specs(config, segments), strict=True)
    ]
    return names


def is_names(node: Any) -> bool:
    """Whether a node is a leaf of `hf_names`."""
    return isinstance(node, str) or (
        isinstance(node, list) and all(isinstance(name, str) for name in node)
    )


def _num_layers(segments: Sequence[Segment]) -> int:
    return sum(segment.repeats * len(segment.pattern) for segment in segments)


def _check_source(source: CheckpointSource, config: ModelConfig, num_layers: int) -> None:
    expected = {name: spec.shape for name, spec in named_tensors(config, num_layers)}
    for name in (*expected, *source.tensors):
        if name not in source.tensors:
            raise UserError(f"{source.name}: tensor {name} is missing; the checkpoint is damaged")
        if name not in expected:
            raise UserError(
                f"{source.name}: tensor {name} has no place in the network that its config.json "
                "describes; the config and the tensors do not belong together"
            )
        if source.tensors[name].shape != expected[name]:
            raise UserError(
                f"{source.name}: tensor {name} has shape {source.tensors[name].shape}, its "
                f"config.json asks for {expected[name]}; the two do not belong together"
            )


def load_params(
    source: CheckpointSource,
    config: ModelConfig,
    segments: Sequence[Segment],
    *,
    dtype: jnp.dtype,
    shardings: Any,
    wanted: Any = None,
) -> Params:
    """Reads a param pytree straight into its shards: each process reads only what its devices hold.

    One leaf at most is in host memory at a time.

    Args:
        source: The checkpoint.
        config: Its network.
        segments: How its blocks are stacked.
        dtype: Type of the leaves.
        shardings: Where each leaf is put: a tree like the param pytree, or a prefix of one.
        wanted: Tree of bools that says which leaves to read, as from `trained_mask`; None reads
            all.

    Returns:
        A param pytree of device arrays, with None where a leaf is not wanted.

    Raises:
        UserError: A tensor is missing, unknown or of another shape.
    """
    _check_source(source, config, _num_layers(segments))

    def read_leaf(names: str | list[str], sharding: Any, is_wanted: bool) -> jax.Array | None:
        if not is_wanted:
            return None
        if isinstance(names, str):
            shape = source.tensors[names].shape
        else:
            shape = (len(names), *source.tensors[names[0]].shape)
        parts: dict[tuple, np.ndarray] = {}

        def read_part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            # Devices of several data groups hold the same part.
            key = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
            if key not in parts:
                parts[key] = _read_part(source, names, index, dtype)
            return parts[key]

        return jax.make_array_from_callback(shape, sharding, read_part)

    all_names = hf_names(config, segments)
    if wanted is None:
        wanted = jax.tree.map(lambda _: True, all_names, is_leaf=is_names)
    shardings = jax.tree.broadcast(shardings, wanted)
    return jax.tree.map(read_leaf, all_names, shardings, wanted, is_leaf=is_names)


def _read_part(
    source: CheckpointSource, names: str | list[str], index: tuple[slice, ...], dtype: jnp.dtype
) -> np.ndarray:
    if isinstance(names, str):
        return source.read_part(names, index).astype(dtype)
    chosen = names[index[0]]
    first = source.read_part(chosen[0], index[1:])
    stacked = np.empty((len(chosen), *first.shape), dtype)
    stacked[0] = first
    for row, name in enumerate(chosen[1:], 1):
        stacked[row] = source.read_part(name, index[1:])
    return stacked


def parameter_hash(tree: Any) -> str:
    """Fingerprint of every leaf of a tree: path, dtype, shape and bytes.

    Args:
        tree: Any pytree of arrays.

    Returns:
        Hexadecimal sha256.
    """
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for name, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in leaves):
        array = np.asarray(leaf, order="C")
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
