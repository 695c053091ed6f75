"""Streams a base checkpoint into a grown one, a block at a time."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from opt_deus_jax.checkpoints.fused import split_fused
from opt_deus_jax.checkpoints.hf import (
    Shard,
    open_hf_directory,
    plan_shards,
    write_index,
    write_shard,
)
from opt_deus_jax.checkpoints.journal import (
    create_resumable,
    forget,
    journal_of,
    keep_written,
    read_notes,
)
from opt_deus_jax.checkpoints.manifest import Manifest, write_manifest
from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.config import UpscaleConfig
from opt_deus_jax.distributed.team import ALONE, Team
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import grown_hf_config, read_model_config
from opt_deus_jax.transport.diagnostics import MapPicture, MatrixReport
from opt_deus_jax.upscaling.grown_tensors import ExpansionPlan, GrownTensors, plan_expansion
from opt_deus_jax.upscaling.identity import IdentityReport, compare_to_base
from opt_deus_jax.upscaling.layout import LayerOrigin
from opt_deus_jax.upscaling.learned import Learned, News, learned_from
from opt_deus_jax.upscaling.lesa import PredictorReport
from opt_deus_jax.upscaling.provenance import expansion_manifest, made_from, model_card
from opt_deus_jax.upscaling.shares import share_out
from opt_deus_jax.whole_files import write_json

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


def _write_own(
    partial: Path,
    shards: Sequence[Shard],
    grown: GrownTensors,
    base_name: str,
    say: Callable[[str], None],
    check: Callable[[], None],
) -> None:
    """Writes what journals do not have of some files."""
    kept: dict[str, dict[str, dict[str, Any]]] = {}
    for shard in shards:
        notes = keep_written(partial, shard)
        changed = next(filter(None, map(grown.first_changed, notes.values())), None)
        if changed:
            say(f"{base_name}: tensor {changed} has changed; {partial / shard.file} is made anew")
            forget(partial, shard)
        kept[shard.file] = {} if changed else notes
        for name in kept[shard.file]:
            grown.pass_over(name)
    names = [name for shard in shards for name, _ in shard.tensors]
    missing = [
        name for shard in shards for name, _ in shard.tensors if name not in kept[shard.file]
    ]
    if len(missing) < len(names):
        number = len(names) - len(missing)
        say(f"{partial}: {number} of {len(names)} tensors are written, and kept")
    with grown.making(missing):
        for shard in shards:
            _write_shard(partial, shard, kept[shard.file], grown, check)


def _write_shard(
    partial: Path,
    shard: Shard,
    kept: Mapping[str, Mapping[str, Any]],
    grown: GrownTensors,
    check: Callable[[], None],
) -> None:
    news = News(kept.values())
    with journal_of(partial, shard) as append:

        def on_written(name: str, array: np.ndarray) -> None:
            append(name, array, news.of(grown.note(name)))
            check()

        write_shard(partial, shard, grown.read, kept=kept, on_written=on_written)


def _finish(
    source: CheckpointSource,
    partial: Path,
    name: str,
    plan: ExpansionPlan,
    shards: Sequence[Shard],
    probe_BT: np.ndarray,
    draw: Draw,
    *,
    is_first: bool,
) -> tuple[Learned, IdentityReport | None]:
    """Makes a checkpoint of a folder that has all weights; its manifest is written last."""
    learned = learned_from(read_notes(partial, shards))
    if not is_first:
        return learned, None
    write_index(partial, shards)
    for file, content in source.side_files.items():
        (partial / file).write_bytes(content)
    write_json(partial / "config.json", grown_hf_config(source.hf_config, plan.parents))
    identity = _prove(source, open_hf_directory(partial, name), plan, probe_BT)
    (partial / "README.md").write_text(model_card(source.name, plan, identity))
    if learned.pictures:
        draw(partial, learned.pictures, learned.reports)
    write_manifest(partial, expansion_manifest(source, plan, learned, identity))
    return learned, identity


def expand_checkpoint(
    source: CheckpointSource,
    upscale: UpscaleConfig,
    directory: Path,
    *,
    probe_BT: Int[np.ndarray, "b t"],
    max_shard_bytes: int,
    devices: Sequence[Any] = (),
    team: Team = ALONE,
    on_layer: Callable[[LayerOrigin], object] = lambda origin: None,
    draw: Draw = lambda directory, pictures, reports: None,
    say: Callable[[str], None] = lambda line: None,
) -> Expansion:
    """Writes the grown model and proves what it computes.

    The folder gets its name only when it is complete and, if zero-initialised, proven identical. In
    memory are at most a tensor, and two blocks and a plan a device (with `lesa` also what
    `learn_block` holds). What a kill leaves is checked by its hashes and kept. The result is the
    same, on however many devices and processes.

    Args:
        source: The base.
        upscale: Which layers are added, and with which weights.
        directory: The Hugging Face folder to make; must not exist.
        probe_BT: Token ids on which the grown model is run against its base.
        max_shard_bytes: Size above which safetensors are split.
        devices: What fuses, a gap each at a time; none for the default device.
        team: The processes that share the files.
        on_layer: Called before each layer is made, for progress.
        draw: Leaves a picture; given the folder, the first new layer's pictures and all reports.
        say: Told what is kept of an expansion that was killed.

    Returns:
        The manifest, the reports, and the distance from the base, in every process.

    Raises:
        UserError: A field contradicts the base, a tensor is not finite, a plan does not converge,
            the disk is full, the folder exists, or an identity is not one.
    """
    plan = plan_expansion(source, upscale)
    grown = GrownTensors(source, plan, devices, on_layer)
    shards = plan_shards(grown.stored, max_shard_bytes)
    own = share_out(shards, grown.fused_depth, team.count)[team.index]
    name, first = str(directory), team.is_first
    learned, identity = create_resumable(
        directory,
        sum(info.num_bytes for _, info in grown.stored),
        made_from(plan, source, max_shard_bytes),
        lambda partial: _write_own(partial, own, grown, source.name, say, team.check),
        lambda partial: _finish(
            source, partial, name, plan, shards, probe_BT, draw, is_first=first
        ),
        say,
        team,
    )
    identity = IdentityReport(**team.gather(identity and dataclasses.asdict(identity))[0])
    manifest = expansion_manifest(source, plan, learned, identity)
    return Expansion(directory, manifest, learned.reports, identity, learned.predictors)
