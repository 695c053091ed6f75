"""Streams a base checkpoint into a grown one, a block at a time."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int

from opt_deus_jax.checkpoints.fused import fuse, split_fused
from opt_deus_jax.checkpoints.hf import open_hf_directory, plan_shards, write_json, write_weights
from opt_deus_jax.checkpoints.journal import Journal, create_resumable
from opt_deus_jax.checkpoints.manifest import Manifest, write_manifest
from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.config import UpscaleConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import grown_hf_config, read_model_config
from opt_deus_jax.transport.diagnostics import MapPicture, MatrixReport
from opt_deus_jax.upscaling.base_tensors import changed_tensor
from opt_deus_jax.upscaling.grown_tensors import ExpansionPlan, GrownTensors, plan_expansion
from opt_deus_jax.upscaling.identity import IdentityReport, compare_to_base
from opt_deus_jax.upscaling.layout import LayerOrigin
from opt_deus_jax.upscaling.lesa import PredictorReport
from opt_deus_jax.upscaling.provenance import expansion_manifest, made_from, model_card

Draw = Callable[[Path, Mapping[str, MapPicture], dict[int, tuple[MatrixReport, ...]]], None]


@dataclasses.dataclass(frozen=True)
class Expansion:
    """What came of an expansion.

    Attributes:
        directory: The Hugging Face folder of the grown model.
        manifest: Its manifest.
        reports: For each fused layer, by depth, the report of each transported matrix.
        identity: The distance from the base.
        predictors: Of method `lesa`: what was learned of each matrix.
    """

    directory: Path
    manifest: Manifest
    reports: dict[int, tuple[MatrixReport, ...]]
    identity: IdentityReport
    predictors: tuple[PredictorReport, ...]


def _prove(
    source: CheckpointSource, grown: CheckpointSource, plan: ExpansionPlan, probe_BT: np.ndarray
) -> IdentityReport:
    """Compares the grown model, as it is stored, to its base; refuses what should be one."""
    grown = split_fused(grown, read_model_config(grown.hf_config))
    identity = compare_to_base(source, grown, probe_BT)
    should_be = plan.method.zero_init or plan.upscale.method == "base"
    if should_be and not identity.bit_identical:
        raise UserError(
            f"{grown.name}: the grown model is not its base (logits differ by up to "
            f"{identity.max_difference:.3g}); nothing was written, please report this"
        )
    return identity


def _finish(
    source: CheckpointSource,
    partial: Path,
    name: str,
    plan: ExpansionPlan,
    reader: GrownTensors,
    probe_BT: np.ndarray,
    draw: Draw,
) -> tuple[Manifest, IdentityReport]:
    """Makes a checkpoint of a folder that has all weights; its manifest is written last."""
    for file, content in source.side_files.items():
        (partial / file).write_bytes(content)
    write_json(partial / "config.json", grown_hf_config(source.hf_config, plan.parents))
    identity = _prove(source, open_hf_directory(partial, name), plan, probe_BT)
    (partial / "README.md").write_text(model_card(source.name, plan, identity))
    if reader.pictures:
        draw(partial, reader.pictures, reader.reports)
    manifest = expansion_manifest(source, plan, reader, identity)
    write_manifest(partial, manifest)
    return manifest, identity


def expand_checkpoint(
    source: CheckpointSource,
    upscale: UpscaleConfig,
    directory: Path,
    *,
    probe_BT: Int[np.ndarray, "b t"],
    max_shard_bytes: int,
    on_layer: Callable[[LayerOrigin], None] = lambda origin: None,
    draw: Draw = lambda directory, pictures, reports: None,
    say: Callable[[str], None] = lambda line: None,
) -> Expansion:
    """Writes the grown model and proves what it computes.

    The folder appears under its name only when it is complete and, if zero-initialised, proven
    identical; at most two blocks, one plan and one tensor are in memory at a time (with method
    `lesa` also what `learn_block` holds). What a killed expansion has written is checked by its
    hashes and kept, and the result is the same.

    Args:
        source: The base.
        upscale: Which layers are added, and with which weights.
        directory: The Hugging Face folder to make; must not exist.
        probe_BT: Token ids on which the grown model is run against its base.
        max_shard_bytes: Size above which safetensors are split.
        on_layer: Called before each layer is made, for progress.
        draw: Leaves a picture; given the folder, the first new layer's pictures and all reports.
        say: Told what is kept of an expansion that was killed.

    Returns:
        The manifest, the reports, and the distance from the base.

    Raises:
        UserError: A field contradicts the base, a tensor is not finite, a plan does not converge,
            the disk is full, the folder exists, or an identity is not one.
    """
    plan = plan_expansion(source, upscale)
    reader = GrownTensors(source, plan, on_layer)
    planned = {name: info for name, (info, _) in reader.planned.items()}
    tensors, read = fuse(planned, reader.read, plan.config, len(plan.layers))
    shards = plan_shards(tensors, max_shard_bytes)
    made: list[tuple[Manifest, IdentityReport]] = []

    def fill(partial: Path, journal: Journal) -> None:
        kept = journal.keep_written(partial, shards)
        if changed := changed_tensor(source, kept.values()):
            say(f"{source.name}: tensor {changed} has changed; {partial} is made anew")
            kept = journal.keep_none()
        elif kept:
            say(f"{directory}: {len(kept)} of {len(tensors)} tensors are written, and kept")
        for name, note in kept.items():
            reader.restore(name, note)

        def on_written(name: str, array: np.ndarray) -> None:
            journal.append(name, array, reader.take_note())

        write_weights(partial, tensors, read, max_shard_bytes, kept=kept, on_written=on_written)
        made.append(_finish(source, partial, str(directory), plan, reader, probe_BT, draw))

    num_bytes = sum(info.num_bytes for _, info in tensors)
    create_resumable(directory, num_bytes, made_from(plan, source, max_shard_bytes), fill, say)
    return Expansion(directory, made[0][0], reader.reports, made[0][1], reader.predictors)
