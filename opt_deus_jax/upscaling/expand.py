"""Streams a base checkpoint into a grown one, a block at a time."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from opt_deus_jax.checkpoints.checksum import json_checksum
from opt_deus_jax.checkpoints.fused import fuse, split_fused
from opt_deus_jax.checkpoints.hf import (
    combine_hashes,
    open_hf_directory,
    plan_shards,
    write_json,
    write_weights,
)
from opt_deus_jax.checkpoints.journal import Journal, create_resumable
from opt_deus_jax.checkpoints.manifest import (
    Manifest,
    manifest_of,
    software_versions,
    write_manifest,
)
from opt_deus_jax.checkpoints.source import CheckpointSource, TensorInfo
from opt_deus_jax.config import UpscaleConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import ModelConfig, grown_hf_config, read_model_config
from opt_deus_jax.models.params import ParamSpec, block_specs, outer_specs
from opt_deus_jax.transport.diagnostics import (
    MapPicture,
    MatrixReport,
    picture_from_json,
    picture_to_json,
    report_from_json,
)
from opt_deus_jax.upscaling.base_tensors import BaseTensors, Parent, changed_tensor
from opt_deus_jax.upscaling.experts import check_parents
from opt_deus_jax.upscaling.fusion import fuse_blocks, transport_epsilon
from opt_deus_jax.upscaling.identity import IdentityReport, compare_to_base
from opt_deus_jax.upscaling.layout import LayerOrigin
from opt_deus_jax.upscaling.lesa import Lesa, PredictorReport, check_predictable, learn_block
from opt_deus_jax.upscaling.methods import Method, layer_parents, plan_layers, resolve_method
from opt_deus_jax.upscaling.new_block import Fused

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


@dataclasses.dataclass(frozen=True)
class _Plan:
    config: ModelConfig
    upscale: UpscaleConfig
    method: Method
    layers: tuple[LayerOrigin, ...]
    parents: tuple[int, ...]


def _specs(plan: _Plan, origin: LayerOrigin) -> dict[str, ParamSpec]:
    """The parameters of a layer of the grown model."""
    return block_specs(plan.config, plan.config.layer_kinds[plan.parents[origin.depth]])


def _planned_tensors(source: CheckpointSource, plan: _Plan) -> dict[str, tuple[TensorInfo, str]]:
    """Every grown tensor, with the base tensor that it equals or takes its dtype from."""
    planned: dict[str, tuple[TensorInfo, str]] = {}
    outer = outer_specs(plan.config)
    names = [(outer["embedding"].hf_name, outer["embedding"].hf_name)]
    for origin, like in zip(plan.layers, plan.parents, strict=True):
        names += [
            (spec.hf_name.format(layer=origin.depth), spec.hf_name.format(layer=like))
            for spec in _specs(plan, origin).values()
        ]
    names += [(spec.hf_name, spec.hf_name) for key, spec in outer.items() if key != "embedding"]
    for name, like in names:
        planned[name] = (source.tensors[like], like)
    return planned


def _fuse_layer(base: BaseTensors, plan: _Plan, origin: LayerOrigin, lesa: Lesa | None) -> Fused:
    if origin.previous is None:
        raise ValueError(f"layer {origin.depth} has no parent")
    previous = Parent(base, plan.config, origin.previous)
    next_ = previous if origin.next is None else Parent(base, plan.config, origin.next)
    return fuse_blocks(
        previous,
        next_,
        config=plan.config.of_layer(plan.parents[origin.depth]),
        weights=plan.method.weights,
        zero_init=plan.method.zero_init,
        transport=plan.upscale.transport,
        epsilon=plan.upscale.epsilon,
        fusion=plan.upscale.fusion,
        output_scale=plan.method.output_scale,
        branch_scale=plan.upscale.branch_scale,
        balance=plan.upscale.balance,
        seed=plan.upscale.seed + origin.depth,
        lesa=lesa,
    )


def _check_converged(depth: int, reports: tuple[MatrixReport, ...]) -> None:
    for matrix in reports:
        if not matrix.converged:
            raise UserError(
                f"new layer {depth}: transport of {matrix.name} did not converge in "
                f"{matrix.iterations} iterations (marginal error {matrix.marginal_error:.1e}); "
                "raise upscale.epsilon or set upscale.transport=assignment"
            )


class _Reader:
    """Makes each tensor of the grown model in the order in which it is written.

    What it learns on the way goes into the journal with the tensor by which it is learned, and
    comes back from there when the tensor is kept.
    """

    def __init__(
        self, source: CheckpointSource, plan: _Plan, on_layer: Callable[[LayerOrigin], None]
    ):
        self.plan, self.on_layer = plan, on_layer
        self.base = BaseTensors(source)
        self.planned = _planned_tensors(source, plan)
        self.fused_tensors: dict[str, np.ndarray] = {}
        self.reports: dict[int, tuple[MatrixReport, ...]] = {}
        self.pictures: Mapping[str, MapPicture] = {}
        self.predictors: tuple[PredictorReport, ...] = ()
        self.lesa: Lesa | None = None
        self.note: dict[str, Any] = {}
        self.layer_of: dict[str, LayerOrigin] = {}
        self.first_of: dict[str, LayerOrigin] = {}
        for origin in plan.layers:
            names = [
                spec.hf_name.format(layer=origin.depth) for spec in _specs(plan, origin).values()
            ]
            self.layer_of |= dict.fromkeys(names, origin)
            self.first_of[names[0]] = origin

    def read(self, name: str) -> np.ndarray:
        if name in self.first_of:
            self.on_layer(self.first_of[name])
        origin = self.layer_of.get(name)
        if origin is None or origin.base_layer is not None:
            return self.base.read(self.planned[name][1])
        if name not in self.fused_tensors:
            self._fuse(origin)
        return self.fused_tensors.pop(name)

    def take_note(self) -> dict[str, Any]:
        """What was learned since the last call, as JSON."""
        note, self.note = self.note, {}
        if hashes := self.base.take_new_hashes():
            note["base"] = hashes
        return note

    def restore(self, name: str, note: Mapping[str, Any]) -> None:
        """Learns what was noted with a tensor that is kept."""
        if name in self.first_of:
            self.on_layer(self.first_of[name])
        self.base.hashes |= note.get("base", {})
        if "reports" in note:
            self.reports[note["depth"]] = tuple(map(report_from_json, note["reports"]))
        if "predictors" in note:
            self.predictors = tuple(PredictorReport(**fields) for fields in note["predictors"])
        if "pictures" in note:
            self.pictures = {k: picture_from_json(v) for k, v in note["pictures"].items()}

    def _learn(self) -> None:
        self.lesa = learn_block(
            lambda name: self.base.read(name).astype(np.float32, copy=False),
            self.plan.config,
            zero_init=self.plan.method.zero_init,
            norms=self.plan.upscale.lesa_norms,
            seed=self.plan.upscale.seed,
        )
        self.predictors = self.lesa.reports
        self.note["predictors"] = [dataclasses.asdict(report) for report in self.predictors]

    def _fuse(self, origin: LayerOrigin) -> None:
        # Some of a layer that was begun before a kill may be kept, and not be asked for.
        self.fused_tensors.clear()
        if self.plan.method.weights == "predicted" and self.lesa is None:
            self._learn()
        fused = _fuse_layer(self.base, self.plan, origin, self.lesa)
        _check_converged(origin.depth, fused.reports)
        self.reports[origin.depth] = fused.reports
        reports = [dataclasses.asdict(report) for report in fused.reports]
        self.note |= {"depth": origin.depth, "reports": reports}
        if not self.pictures and fused.pictures:
            self.pictures = fused.pictures
            pictures = {name: picture_to_json(p) for name, p in fused.pictures.items()}
            self.note["pictures"] = pictures
        for key, spec in _specs(self.plan, origin).items():
            hf_name = spec.hf_name.format(layer=origin.depth)
            cast = fused.block.pop(key).astype(self.planned[hf_name][0].dtype)
            if not np.isfinite(cast).all():
                raise UserError(
                    f"new layer {origin.depth}: {key} is not finite after fusion; raise "
                    "upscale.epsilon or use another upscale.transport"
                )
            self.fused_tensors[hf_name] = cast


def _prove(
    source: CheckpointSource, grown: CheckpointSource, plan: _Plan, probe_BT: np.ndarray
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


def _options(plan: _Plan) -> dict[str, Any]:
    options: dict[str, Any] = dataclasses.asdict(plan.method)
    options |= {"num_new_layers": sum(layer.is_new for layer in plan.layers)}
    if plan.method.weights == "transport":
        options["transport"] = plan.upscale.transport
        if plan.upscale.transport in ("reference", "barycentric"):
            options["epsilon"] = transport_epsilon(plan.upscale.transport, plan.upscale.epsilon)
        elif plan.upscale.epsilon is not None:
            options["epsilon"] = plan.upscale.epsilon
    if plan.method.weights:
        options |= {"branch_scale": plan.upscale.branch_scale, "balance": plan.upscale.balance}
    if plan.method.weights in ("transport", "average"):
        options["fusion"] = plan.upscale.fusion
    if plan.method.weights in ("random", "predicted"):
        options["seed"] = plan.upscale.seed
    if plan.method.weights == "predicted":
        options["lesa_norms"] = plan.upscale.lesa_norms
    return options


def _model_card(name: str, plan: _Plan, identity: IdentityReport) -> str:
    new = [origin.depth for origin in plan.layers if origin.is_new]
    exact = (
        "computes exactly what its base computes"
        if identity.bit_identical
        else (f"differs from its base by {identity.mean_divergence:.4f} nats (mean KL)")
    )
    return (
        f"---\nlibrary_name: transformers\ntags: [depth-up-scaling, opt_deus_jax]\n---\n\n"
        f"# {Path(name).name}, grown to {len(plan.layers)} layers\n\n"
        f"Made by [opt_deus_jax](https://arxiv.org/abs/2508.08011) from `{Path(name).name}` "
        f"({plan.config.num_layers} layers) with method `{plan.upscale.method}`.\n"
        f"New layers: {', '.join(map(str, new)) or 'none'}.\n\n"
        f"Right after expansion the model {exact} ({identity.tokens} tokens compared). "
        "How it was made stands in `upscale_manifest.json`. The licence is that of the base.\n"
    )


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
    config = read_model_config(source.hf_config, f"{source.name}: config.json")
    method = resolve_method(upscale)
    base = manifest_of(source) if upscale.method == "base" else None
    layers = plan_layers(upscale, config.num_layers, base)
    check_parents(config, method.weights, layers)
    plan = _Plan(config, upscale, method, layers, layer_parents(method, layers))
    if method.weights == "predicted":
        for kind in dict.fromkeys(config.layer_kinds):
            check_predictable(block_specs(config, kind), config.num_layers)
    reader = _Reader(source, plan, on_layer)
    planned = {name: info for name, (info, _) in reader.planned.items()}
    tensors, read = fuse(planned, reader.read, config, len(layers))
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
        for file, content in source.side_files.items():
            (partial / file).write_bytes(content)
        write_json(partial / "config.json", grown_hf_config(source.hf_config, plan.parents))
        grown = open_hf_directory(partial, str(directory))
        identity = _prove(source, grown, plan, probe_BT)
        (partial / "README.md").write_text(_model_card(source.name, plan, identity))
        if reader.pictures:
            draw(partial, reader.pictures, reader.reports)
        made.append((_manifest(source, plan, reader, identity), identity))
        write_manifest(partial, made[0][0])

    num_bytes = sum(info.num_bytes for _, info in tensors)
    create_resumable(directory, num_bytes, _made_from(plan, source, max_shard_bytes), fill, say)
    return Expansion(directory, made[0][0], reader.reports, made[0][1], reader.predictors)


def _made_from(plan: _Plan, source: CheckpointSource, max_shard_bytes: int) -> dict[str, Any]:
    """All that the written tensors depend on; the base's numbers are hashed as they are read."""
    tensors = {name: [info.shape, info.dtype.name] for name, info in source.tensors.items()}
    return {
        "base": json_checksum([source.hf_config, tensors]),
        "upscale": dataclasses.asdict(plan.upscale),
        "max_shard_bytes": max_shard_bytes,
        "versions": software_versions(),
    }


def _manifest(
    source: CheckpointSource, plan: _Plan, reader: _Reader, identity: IdentityReport
) -> Manifest:
    base: dict[str, Any] = {
        "name": Path(source.name).name,
        "num_layers": plan.config.num_layers,
        "sha256": combine_hashes(reader.base.hashes),
    }
    if tokenizer_json := source.side_files.get("tokenizer.json"):
        base["tokenizer_sha256"] = hashlib.sha256(tokenizer_json).hexdigest()
    return Manifest(
        method=plan.upscale.method,
        options=_options(plan),
        trained=plan.method.trained,
        layers=tuple(dataclasses.asdict(layer) for layer in plan.layers),
        base=base,
        identity=dataclasses.asdict(identity),
        diagnostics=tuple(
            {
                "depth": depth,
                **{k: v for k, v in dataclasses.asdict(report).items() if k != "match_order"},
            }
            for depth, reports in reader.reports.items()
            for report in reports
        )
        + tuple(map(dataclasses.asdict, reader.predictors)),
        versions=software_versions(),
    )
