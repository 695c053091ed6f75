"""The tensors of a grown model, made one after another in the order in which they are written."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from opt_deus_jax.checkpoints.manifest import manifest_of
from opt_deus_jax.checkpoints.source import CheckpointSource, TensorInfo
from opt_deus_jax.config import UpscaleConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import ModelConfig, read_model_config
from opt_deus_jax.models.params import ParamSpec, block_specs, outer_specs
from opt_deus_jax.transport.diagnostics import (
    MapPicture,
    MatrixReport,
    picture_from_json,
    picture_to_json,
    report_from_json,
)
from opt_deus_jax.upscaling.base_tensors import BaseTensors, Parent
from opt_deus_jax.upscaling.experts import check_parents
from opt_deus_jax.upscaling.fusion import fuse_blocks
from opt_deus_jax.upscaling.layout import LayerOrigin
from opt_deus_jax.upscaling.lesa import Lesa, PredictorReport, check_predictable, learn_block
from opt_deus_jax.upscaling.methods import Method, layer_parents, plan_layers, resolve_method
from opt_deus_jax.upscaling.new_block import Fused


@dataclasses.dataclass(frozen=True)
class ExpansionPlan:
    """What an expansion will make.

    Attributes:
        config: The base.
        upscale: The `upscale` part of an experiment.
        method: It, resolved.
        layers: Of the grown model, from the embedding up.
        parents: For each of them the base layer whose kind it has.
    """

    config: ModelConfig
    upscale: UpscaleConfig
    method: Method
    layers: tuple[LayerOrigin, ...]
    parents: tuple[int, ...]


def plan_expansion(source: CheckpointSource, upscale: UpscaleConfig) -> ExpansionPlan:
    """Works out what an expansion will make.

    Args:
        source: The base.
        upscale: Which layers are added, and with which weights.

    Returns:
        The plan.

    Raises:
        UserError: A field contradicts the base.
    """
    config = read_model_config(source.hf_config, f"{source.name}: config.json")
    method = resolve_method(upscale)
    base = manifest_of(source) if upscale.method == "base" else None
    layers = plan_layers(upscale, config.num_layers, base)
    check_parents(config, method.weights, layers)
    if method.weights == "predicted":
        for kind in dict.fromkeys(config.layer_kinds):
            check_predictable(block_specs(config, kind), config.num_layers)
    return ExpansionPlan(config, upscale, method, layers, layer_parents(method, layers))


def _specs(plan: ExpansionPlan, origin: LayerOrigin) -> dict[str, ParamSpec]:
    """The parameters of a layer of the grown model."""
    return block_specs(plan.config, plan.config.layer_kinds[plan.parents[origin.depth]])


def _planned_tensors(
    source: CheckpointSource, plan: ExpansionPlan
) -> dict[str, tuple[TensorInfo, str]]:
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


def _fuse_layer(
    base: BaseTensors, plan: ExpansionPlan, origin: LayerOrigin, lesa: Lesa | None
) -> Fused:
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


class GrownTensors:
    """Makes each tensor of the grown model in the order in which it is written.

    What it learns on the way goes into the journal with the tensor by which it is learned, and
    comes back from there when the tensor is kept.
    """

    def __init__(
        self, source: CheckpointSource, plan: ExpansionPlan, on_layer: Callable[[LayerOrigin], None]
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
        """Makes a tensor, by the names of `named_tensors`."""
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
