"""Between a checkpoint's named tensors and the stacked leaves of a param pytree."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opt_deus_jax.checkpoints import orbax
from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.language_model import Params
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.params import block_specs, named_tensors, outer_specs
from opt_deus_jax.training.placement import abstract_params
from opt_deus_jax.training.segments import (
    Segment,
    TrainedNames,
    depth_of,
    partition,
    plan_segments,
    trained_mask,
)


def _hf_names(config: ModelConfig, segments: Sequence[Segment]) -> dict[str, Any]:
    """The param pytree with, for each leaf, the names of its tensors: one, or a list of rows."""
    names: dict[str, Any] = {name: spec.hf_name for name, spec in outer_specs(config).items()}
    names["segments"] = [
        [
            {
                name: [
                    spec.hf_name.format(layer=depth_of(segment, repeat, place))
                    for repeat in range(segment.repeats)
                ]
                for name, spec in block_specs(config).items()
            }
            for place in range(len(segment.pattern))
        ]
        for segment in segments
    ]
    return names


def _is_names(node: Any) -> bool:
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

    all_names = _hf_names(config, segments)
    if wanted is None:
        wanted = jax.tree.map(lambda _: True, all_names, is_leaf=_is_names)
    shardings = jax.tree.broadcast(shardings, wanted)
    return jax.tree.map(read_leaf, all_names, shardings, wanted, is_leaf=_is_names)


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


def load_trained(
    directory: Path, config: ModelConfig, trained: TrainedNames
) -> tuple[int, Params, dict[str, Any]]:
    """Reads the trained parameters of the latest training checkpoint, and nothing else.

    Args:
        directory: The `checkpoints` folder of a work directory.
        config: The network.
        trained: The parameters that were trained.

    Returns:
        (step, param pytree of float32 arrays with None for frozen leaves, metadata as `train`
        wrote it).

    Raises:
        UserError: There is no checkpoint.
    """
    segments = plan_segments(trained.blocks)
    mask = trained_mask(config, segments, trained.outer)
    first_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract, _ = partition(
        abstract_params(config, segments, jnp.dtype("float32"), first_device), mask
    )
    return orbax.load_trainable(directory, abstract)


def tensor_by_name(
    params: Params,
    config: ModelConfig,
    segments: Sequence[Segment],
    frozen: Callable[[str], np.ndarray] | None = None,
) -> Callable[[str], np.ndarray]:
    """Gives access to the tensors of a param pytree by their Hugging Face names.

    Args:
        params: A param pytree; with None for frozen leaves where `frozen` is given.
        config: The network.
        segments: How its blocks are stacked.
        frozen: Reads a tensor whose leaf is None, as `CheckpointSource.read` of the model that was
            trained: so frozen tensors come out bit for bit as they went in.

    Returns:
        A function from name to array, which copies no more than that tensor to the host; it raises
        KeyError for an unknown name.
    """
    places: dict[str, tuple[Any, int | None]] = {}

    def note(names: str | list[str], leaf: Any) -> None:
        rows = [(names, None)] if isinstance(names, str) else [(n, r) for r, n in enumerate(names)]
        places.update({name: (leaf, row) for name, row in rows})

    jax.tree.map(note, _hf_names(config, segments), params, is_leaf=_is_names)

    def read(name: str) -> np.ndarray:
        leaf, row = places[name]
        if leaf is not None:
            return np.asarray(leaf if row is None else leaf[row])
        if frozen is None:
            raise ValueError(f"parameter {name} is frozen and no reader of frozen ones was given")
        return frozen(name)

    return read


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
