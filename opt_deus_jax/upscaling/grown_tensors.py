"""The tensors of a grown model, made one after another in the order in which they are written."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from opt_deus_jax.checkpoints.fused import fuse, parts_of_stored
from opt_deus_jax.checkpoints.manifest import manifest_of
from opt_deus_jax.checkpoints.source import CheckpointSource, TensorInfo
from opt_deus_jax.config import UpscaleConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import ModelConfig, grown_hf_config, read_model_config
from opt_deus_jax.models.params import ParamSpec, block_specs, outer_specs
from opt_deus_jax.transport.diagnostics import MatrixReport
from opt_deus_jax.upscaling.base_tensors import BaseTensors, parent_block
from opt_deus_jax.upscaling.experts import check_parents
from opt_deus_jax.upscaling.fusion import fuse_blocks
from opt_deus_jax.upscaling.layout import LayerOrigin
from opt_deus_jax.upscaling.learned import note_of_layer
from opt_deus_jax.upscaling.lesa import Lesa, check_predictable, learn_block
from opt_deus_jax.upscaling.lookahead import Lookahead
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

    @property
    def is_new(self) -> list[bool]:
        """For every layer whether it is new."""
        return [layer.is_new for layer in self.layers]


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


def grown_config(source: CheckpointSource, plan: ExpansionPlan) -> ModelConfig:
    """The network of the grown model."""
    return read_model_config(grown_hf_config(source.hf_config, plan.parents))


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
    read: Callable[[str], np.ndarray], plan: ExpansionPlan, origin: LayerOrigin, lesa: Lesa | None
) -> Fused:
    if origin.previous is None:
        raise ValueError(f"layer {origin.depth} has no parent")
    previous = parent_block(read, plan.config, origin.previous)
    next_ = previous if origin.next is None else parent_block(read, plan.config, origin.next)
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


class _FusedLayer(NamedTuple):
    """A new layer's tensors in the dtypes they are stored in, and what is noted with each."""

    tensors: dict[str, np.ndarray]
    note: dict[str, Any]


class GrownTensors:
    """Makes each tensor of a grown model in the order in which it is written.

    Attributes:
        stored: Name, shape and dtype of all tensors, as they are stored and in that order.
    """

    def __init__(
        self,
        source: CheckpointSource,
        plan: ExpansionPlan,
        devices: Sequence[Any],
        on_layer: Callable[[LayerOrigin], object],
    ):
        """Makes nothing yet.

        Args:
            source: The base.
            plan: What is made of it.
            devices: What fuses, one gap each at a time; none for the default device.
            on_layer: Called before each layer is made or told of.
        """
        self._plan, self._devices, self._on_layer = plan, devices, on_layer
        self._base = BaseTensors(source)
        self._planned = _planned_tensors(source, plan)
        infos = {name: info for name, (info, _) in self._planned.items()}
        depth = len(plan.layers)
        self.stored, self._read_stored = fuse(infos, self._read_part, plan.config, depth)
        self._parts = parts_of_stored(infos, plan.config, depth)
        self._layer_of: dict[str, LayerOrigin] = {}
        self._first_of: dict[str, LayerOrigin] = {}
        for origin in plan.layers:
            names = [
                spec.hf_name.format(layer=origin.depth) for spec in _specs(plan, origin).values()
            ]
            self._layer_of |= dict.fromkeys(names, origin)
            self._first_of[names[0]] = origin
        self._lesa: Lesa | None = None
        self._learned_of: dict[str, str] = {}
        self._ahead: Lookahead[_FusedLayer] = Lookahead(self._fuse, (), ())
        self._held: dict[str, np.ndarray] = {}
        self._notes: dict[int, dict[str, Any]] = {}

    def fused_depth(self, stored: str) -> int | None:
        """The depth of the fused layer that a tensor is of, None for one that is copied."""
        origin = self._layer_of.get(self._parts[stored][0])
        return origin.depth if origin is not None and origin.base_layer is None else None

    def first_changed(self, note: Mapping[str, Any]) -> str | None:
        """The first tensor of the base that is not what it was when something was noted."""
        return self._base.first_changed(note.get("base", {}))

    def pass_over(self, stored: str) -> None:
        """Says that a tensor is written already."""
        for part in self._parts[stored]:
            if part in self._first_of:
                self._on_layer(self._first_of[part])

    @contextlib.contextmanager
    def making(self, missing: Iterable[str]) -> Iterator[None]:
        """Makes ready for `read` of tensors, in this order.

        Args:
            missing: Names of what is stored.
        """
        depths = dict.fromkeys(map(self.fused_depth, missing))
        layers = [self._plan.layers[depth] for depth in depths if depth is not None]
        if layers and self._plan.method.weights == "predicted":
            self._learn()
        self._ahead = Lookahead(self._fuse, layers, self._devices)
        try:
            yield
        finally:
            self._ahead.close()

    def read(self, stored: str) -> np.ndarray:
        """Makes a tensor as it is stored."""
        return self._read_stored(stored)

    def note(self, stored: str) -> dict[str, Any]:
        """What is to be known of a tensor that has been made, as JSON (see learned.py)."""
        depth = self.fused_depth(stored)
        if depth is not None:
            return self._notes[depth]
        likes = (self._planned[part][1] for part in self._parts[stored])
        return {"base": {like: self._base.hashes[like] for like in likes}}

    def _read_part(self, name: str) -> np.ndarray:
        """Makes a tensor, by the names of `named_tensors`."""
        if name in self._first_of:
            self._on_layer(self._first_of[name])
        origin = self._layer_of.get(name)
        if origin is None or origin.base_layer is not None:
            return self._base.read(self._planned[name][1])
        if name not in self._held:
            # Some of the layer before may be of another's file or kept, and not be asked for.
            self._held.clear()
            self._held, self._notes[origin.depth] = self._ahead.take(origin)
        tensor = self._held.pop(name)
        if not self._held:
            self._ahead.let_go(origin)
        return tensor

    def _recording(self, used: dict[str, str]) -> Callable[[str], np.ndarray]:
        """Reads the base, and keeps the hashes of what is read."""

        def read(name: str) -> np.ndarray:
            array = self._base.read(name)
            used[name] = self._base.hashes[name]
            return array

        return read

    def _learn(self) -> None:
        read = self._recording(self._learned_of)
        self._lesa = learn_block(
            lambda name: read(name).astype(np.float32, copy=False),
            self._plan.config,
            zero_init=self._plan.method.zero_init,
            norms=self._plan.upscale.lesa_norms,
            seed=self._plan.upscale.seed,
        )

    def _fuse(self, origin: LayerOrigin) -> _FusedLayer:
        used = dict(self._learned_of)
        fused = _fuse_layer(self._recording(used), self._plan, origin, self._lesa)
        _check_converged(origin.depth, fused.reports)
        tensors: dict[str, np.ndarray] = {}
        for key, spec in _specs(self._plan, origin).items():
            hf_name = spec.hf_name.format(layer=origin.depth)
            cast = fused.block.pop(key).astype(self._planned[hf_name][0].dtype)
            if not np.isfinite(cast).all():
                raise UserError(
                    f"new layer {origin.depth}: {key} is not finite after fusion; raise "
                    "upscale.epsilon or use another upscale.transport"
                )
            tensors[hf_name] = cast
        predictors = self._lesa.reports if self._lesa is not None else ()
        first = next(layer.depth for layer in self._plan.layers if layer.base_layer is None)
        is_first = origin.depth == first
        note = note_of_layer(origin.depth, fused, used, predictors, is_first=is_first)
        return _FusedLayer(tensors, note)
