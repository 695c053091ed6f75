"""From a training checkpoint to a Hugging Face folder."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from opt_deus_jax.checkpoints.fused import fuse
from opt_deus_jax.checkpoints.hf import create_directory, write_weights
from opt_deus_jax.checkpoints.manifest import read_manifest
from opt_deus_jax.checkpoints.saved_step import NOT_READ, SavedStep, find_step, load_some
from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.models.model_config import ModelConfig, read_model_config
from opt_deus_jax.training.placement import abstract_params
from opt_deus_jax.training.segments import (
    TrainedNames,
    partition,
    plan_segments,
    select_trained,
    trained_mask,
)
from opt_deus_jax.training.weights import hf_names, is_names
from opt_deus_jax.whole_files import write_json


@dataclasses.dataclass(frozen=True)
class Export:
    """What was exported.

    Attributes:
        directory: The Hugging Face folder.
        step: The optimizer step of the checkpoint that it was made from.
    """

    directory: Path
    step: int


def export_checkpoint(
    expanded: CheckpointSource,
    expanded_directory: Path,
    checkpoints: Path,
    which: str,
    directory: Path,
    *,
    max_shard_bytes: int,
) -> Export:
    """Writes the trained model as transformers and vLLM load it, one stack of tensors at a time.

    Frozen tensors are copied from the grown model bit for bit; trained ones are rounded from their
    float32 masters to the dtype that the grown model stores them in.

    Args:
        expanded: The grown model.
        expanded_directory: Its folder, with the manifest.
        checkpoints: The folder of training checkpoints.
        which: `latest`, `best` or a step.
        directory: The folder to make; must not exist.
        max_shard_bytes: Size above which safetensors are split.

    Returns:
        The folder and the step.

    Raises:
        UserError: There is no such checkpoint or it is damaged, the folder exists or the disk is
            full.
    """
    manifest = read_manifest(expanded_directory)
    config = read_model_config(expanded.hf_config, expanded.name)
    trained = select_trained(config, manifest.is_new, manifest.trained)
    saved = find_step(checkpoints, which)
    names, read_trained = trained_tensors(saved, config, trained)

    def read(name: str) -> np.ndarray:
        if name in names:
            return read_trained(name).astype(expanded.tensors[name].dtype, copy=False)
        return expanded.read(name)

    frozen = [name for name in expanded.tensors if name not in names]
    in_order = {name: expanded.tensors[name] for name in (*frozen, *names)}
    tensors, read_stored = fuse(in_order, read, config, config.num_layers)

    def fill(partial: Path) -> None:
        write_weights(partial, tensors, read_stored, max_shard_bytes)
        for file, content in expanded.side_files.items():
            (partial / file).write_bytes(content)
        write_json(partial / "config.json", expanded.hf_config)
        card = (expanded_directory / "README.md").read_text()
        kind = {"all": "All layers were", "new": "Only the new layers were"}.get(
            manifest.trained, f"Only the tensors named like `{manifest.trained}` were"
        )
        (partial / "README.md").write_text(f"{card}\n{kind} then trained for {saved.step} steps.\n")

    create_directory(directory, sum(i.num_bytes for i in expanded.tensors.values()), fill)
    return Export(directory, saved.step)


def trained_tensors(
    saved: SavedStep, config: ModelConfig, trained: TrainedNames
) -> tuple[tuple[str, ...], Callable[[str], np.ndarray]]:
    """Gives access to the trained tensors of a checkpoint by their Hugging Face names.

    Args:
        saved: The checkpoint.
        config: The network.
        trained: The parameters that were trained.

    Returns:
        (names, read). `read(name)` gives a float32 array; the stack that it belongs to stays in
        memory until a tensor of another one is read, or of as many others as are stored as one,
        and the names are in the order of the stacks.
        It raises UserError where the checkpoint is damaged.
    """
    segments = plan_segments(trained.blocks, config.layer_kinds)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract, _ = partition(
        abstract_params(config, segments, np.dtype(np.float32), device),
        trained_mask(config, segments, trained.outer),
    )
    stacks = {path for path, _ in jax.tree_util.tree_leaves_with_path(abstract)}
    places: dict[str, tuple[tuple, int | None]] = {}
    for stack, names in jax.tree_util.tree_leaves_with_path(
        hf_names(config, segments), is_leaf=is_names
    ):
        if stack not in stacks:
            continue
        if isinstance(names, str):
            places[names] = (stack, None)
        else:
            places |= {name: (stack, row) for row, name in enumerate(names)}
    held: dict[tuple, np.ndarray] = {}
    most_held = max((len(parts) for parts in config.facts.fused.values()), default=1)

    def read(name: str) -> np.ndarray:
        stack, row = places[name]
        if stack not in held:
            while len(held) >= most_held:
                del held[next(iter(held))]
            wanted = jax.tree_util.tree_map_with_path(
                lambda path, leaf: leaf if path == stack else NOT_READ, abstract
            )
            tree = load_some(saved, {"trainable": wanted})["trainable"]
            (leaf,) = (leaf for leaf in jax.tree.leaves(tree) if leaf is not NOT_READ)
            held[stack] = np.asarray(leaf)
        return held[stack] if row is None else held[stack][row]

    return tuple(places), read
