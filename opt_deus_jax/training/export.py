"""From a training checkpoint to a Hugging Face folder."""

import dataclasses
from pathlib import Path

import numpy as np

from opt_deus_jax.checkpoints.hf import create_directory, write_json, write_weights
from opt_deus_jax.checkpoints.manifest import read_manifest
from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.training.segments import plan_segments, select_trained
from opt_deus_jax.training.weights import load_trained, tensor_by_name


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
    directory: Path,
    *,
    max_shard_bytes: int,
) -> Export:
    """Writes the trained model as transformers and vLLM load it, one tensor at a time.

    Frozen tensors are copied from the grown model bit for bit; trained ones are rounded from their
    float32 masters to the dtype that the grown model stores them in.

    Args:
        expanded: The grown model.
        expanded_directory: Its folder, with the manifest.
        checkpoints: The folder of training checkpoints; the latest is taken.
        directory: The folder to make; must not exist.
        max_shard_bytes: Size above which safetensors are split.

    Returns:
        The folder and the step.

    Raises:
        UserError: There is no checkpoint, the folder exists or the disk is full.
    """
    manifest = read_manifest(expanded_directory)
    config = read_model_config(expanded.hf_config, expanded.name)
    trained = select_trained(config, manifest.is_new, manifest.trained)
    step, trainable, _ = load_trained(checkpoints, config, trained)
    segments = plan_segments(trained.blocks)
    read = tensor_by_name(trainable, config, segments, frozen=expanded.read)

    def read_in_own_dtype(name: str) -> np.ndarray:
        return read(name).astype(expanded.tensors[name].dtype, copy=False)

    def fill(partial: Path) -> None:
        write_weights(partial, expanded.tensors.items(), read_in_own_dtype, max_shard_bytes)
        for file, content in expanded.side_files.items():
            (partial / file).write_bytes(content)
        write_json(partial / "config.json", expanded.hf_config)
        card = (expanded_directory / "README.md").read_text()
        kind = {"all": "All layers were", "new": "Only the new layers were"}.get(
            manifest.trained, f"Only the tensors named like `{manifest.trained}` were"
        )
        (partial / "README.md").write_text(f"{card}\n{kind} then trained for {step} steps.\n")

    create_directory(directory, sum(i.num_bytes for i in expanded.tensors.values()), fill)
    return Export(directory, step)
