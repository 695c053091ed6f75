"""Two adjacent blocks to one new block."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.params import block_specs, identity_values
from opt_deus_jax.transport.diagnostics import MapPicture, MatrixReport, picture_of, report
from opt_deus_jax.transport.plan import Plan, ScaledKernel, is_wide, move_columns
from opt_deus_jax.transport.sinkhorn import DEFAULT_RELATIVE_EPSILON, REFERENCE_EPSILON
from opt_deus_jax.upscaling.alignment import align, average_aligned
from opt_deus_jax.upscaling.blending import restore_rows
from opt_deus_jax.upscaling.experts import EXPERT_PARAMETERS, fuse_experts
from opt_deus_jax.upscaling.features import shift_norms
from opt_deus_jax.upscaling.lesa import Lesa, predict_block
from opt_deus_jax.upscaling.new_block import Block, Fused
from opt_deus_jax.upscaling.symmetric import fuse_symmetric


def transport_epsilon(transport: str, epsilon: float | None) -> float:
    """The entropy that a transport runs with: the given one, or the transport's own."""
    if epsilon is not None:
        return epsilon
    return REFERENCE_EPSILON if transport == "reference" else DEFAULT_RELATIVE_EPSILON


_move_columns = jax.jit(move_columns)


def _is_norm(name: str) -> bool:
    return name.endswith("_norm")


@dataclasses.dataclass(frozen=True)
class _Choices:
    """How the kernels of two parents are fused.

    Attributes:
        transport: See `align`.
        epsilon: See `align`.
        fusion: `mean` or `rescaled`.
        norm_offset: What is added to the scale of a norm where it is applied.
    """

    transport: str
    epsilon: float
    fusion: str
    norm_offset: float


class _Part(NamedTuple):
    """Some parameters of a new block, and what is known about their making."""

    params: Mapping[str, Array]
    reports: list[MatrixReport]
    maps: Mapping[str, Plan]
    pictures: Mapping[str, MapPicture]


def _read(block: Block, name: str, choices: _Choices) -> Array:
    # One at a time: a block of an 8B model takes 0.9 GB in float32.
    offset = choices.norm_offset if _is_norm(name) else 0.0
    return jnp.asarray(block[name] + np.float32(offset) if offset else block[name])


def _fuse_pair(
    name: str, kernel_a: Array, kernel_b: Array, choices: _Choices
) -> tuple[Array, Plan, MatrixReport]:
    aligned = align(kernel_a, kernel_b, transport=choices.transport, epsilon=choices.epsilon)
    fused_kernel = aligned.fused_ND
    if choices.fusion == "rescaled":
        fused_kernel = jnp.asarray(restore_rows(*map(np.asarray, (fused_kernel, kernel_b))))
    line = report(name, aligned.coupling, fused_kernel, kernel_a, kernel_b)
    return fused_kernel, aligned.map_MN, line


def _fuse_kernel(
    name: str, kernel_a: Array, previous: Block, next_: Block, choices: _Choices
) -> _Part:
    """A's kernel, as it is given, with B's; what belongs to its rows goes with them."""
    kernel_b = _read(next_, f"{name}_kernel", choices)
    kernel, map_MN, line = _fuse_pair(name, kernel_a, kernel_b, choices)
    params = {f"{name}_kernel": kernel}
    for row_name in (f"{name}_bias", f"{name}_norm"):
        if row_name in previous and previous[row_name].size == kernel_a.shape[0]:
            columns = (_read(block, row_name, choices)[:, None] for block in (previous, next_))
            params[row_name] = average_aligned(map_MN, *columns)[:, 0]
    # Others need that of output. The rest are for callers, who can do without wide ones.
    is_kept = name == "output" or not is_wide(*map_MN.shape)
    picture = picture_of(map_MN, line.match_order)
    return _Part(params, [line], {name: map_MN} if is_kept else {}, {name: picture})


def _fuse_experts(
    previous: Block,
    next_: Block,
    output_map: Plan,
    choices: _Choices,
    config: ModelConfig,
    needs_down: bool,
) -> _Part:
    """Experts are matched first, then fused in pairs like MLPs."""
    names = ("post_attention_norm", *EXPERT_PARAMETERS)
    a, b = ({k: _read(block, k, choices) for k in names} for block in (previous, next_))

    def fuse(name: str, kernel_a: Array, kernel_b: Array) -> tuple[Array, MatrixReport]:
        moved = kernel_a if name == "down" else _move_columns(kernel_a, output_map)
        kernel, _, line = _fuse_pair(name, moved, kernel_b, choices)
        return kernel, line

    matrices = ("gate", "up", "down") if needs_down else ("gate", "up")
    kernels, lines, map_EE = fuse_experts(a, b, config, matrices, choices.fusion, fuse)
    router_map = jnp.asarray(map_EE)
    pictures = {"router": picture_of(router_map, lines[0].match_order)}
    return _Part(kernels, lines, {"router": router_map}, pictures)


def _transport(
    previous: Block, next_: Block, choices: _Choices, *, config: ModelConfig, needs_down: bool
) -> Fused:
    """OpT-DeUS, in the order of its authors' code (Cao et al. 2025, arXiv 2508.08011).

    Norms that Llama does not have are averaged; those of whole projections follow their rows.
    """
    read = functools.partial(_read, choices=choices)

    def fuse(name: str, kernel_a: Array) -> _Part:
        return _fuse_kernel(name, kernel_a, previous, next_, choices)

    fused = {
        name: (read(previous, name) + read(next_, name)) / 2 for name in previous if _is_norm(name)
    }
    attention = ("query", "key", "value", "output")
    parts = [fuse(name, read(previous, f"{name}_kernel")) for name in attention]
    output_map = parts[-1].maps["output"]
    if "post_attention_norm" in previous:
        norm_a = read(previous, "post_attention_norm")
        moved_norm = _move_columns(norm_a[None], output_map)[0]
        norm_a = (moved_norm + norm_a) / 2
        norm = (norm_a + read(next_, "post_attention_norm")) / 2
        fused["post_attention_norm"] = norm
    if "router_kernel" in previous:
        parts.append(_fuse_experts(previous, next_, output_map, choices, config, needs_down))
    else:
        for name in ("gate", "up"):
            moved = _move_columns(read(previous, f"{name}_kernel"), output_map)
            parts.append(fuse(name, moved))
        if needs_down:
            parts.append(fuse("down", read(previous, "down_kernel")))
    for part in parts:
        fused |= part.params
    block = {name: np.asarray(value) for name, value in fused.items()}
    maps = {name: plan for part in parts for name, plan in part.maps.items()}
    return Fused(
        dict(shift_norms(block, -choices.norm_offset)),
        tuple(line for part in parts for line in part.reports),
        {name: np.asarray(m) for name, m in maps.items() if not isinstance(m, ScaledKernel)},
        {name: picture for part in parts for name, picture in part.pictures.items()},
    )


def _random_block(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    block: dict[str, np.ndarray] = {}
    for name, spec in block_specs(config).items():
        if spec.init == "normal":
            block[name] = generator.normal(0.0, 0.02, spec.shape).astype(np.float32)
        else:
            block[name] = np.full(spec.shape, float(spec.init == "ones"), np.float32)
    return block


def _halved(block: Block) -> dict[str, np.ndarray]:
    # What the kernels of the authors' fusion come to; norms are B's, theirs are of both parents.
    return {k: v if _is_norm(k) else v / 2 for k, v in block.items()}


def _averaged(previous: Block, next_: Block, fusion: str) -> dict[str, np.ndarray]:
    block = {name: (previous[name] + next_[name]) / 2 for name in previous}
    if fusion == "rescaled":
        for name in (name for name in block if name.endswith("_kernel")):
            block[name] = restore_rows(block[name], next_[name])
    return block


def _end_branches(
    block: dict[str, np.ndarray], config: ModelConfig, zero_init: bool, output_scale: float
) -> dict[str, np.ndarray]:
    """Zeroes or scales what ends the residual branches; the parents' arrays are not touched."""
    specs = block_specs(config)
    for name, zero in identity_values(config).items():
        if zero_init:
            block[name] = np.full(specs[name].shape, zero, np.float32)
        elif output_scale != 1:
            block[name] = zero + np.float32(output_scale) * (block[name] - np.float32(zero))
    return block


def _pictures(made: Fused) -> Mapping[str, MapPicture]:
    """Those that were made on the way, or else of the maps."""
    order = {line.name: line.match_order for line in made.reports}
    return made.pictures or {
        name: picture_of(m, order[name]) for name, m in made.maps.items() if name in order
    }


def fuse_blocks(
    previous: Block,
    next_: Block,
    *,
    config: ModelConfig,
    weights: str,
    zero_init: bool,
    transport: str = "barycentric",
    epsilon: float | None = None,
    fusion: str = "mean",
    output_scale: float = 1.0,
    seed: int = 0,
    lesa: Lesa | None = None,
) -> Fused:
    """Makes a new block from its parents.

    Args:
        previous: Parent A, float32 arrays by the names of `block_specs`.
        next_: Parent B, likewise.
        config: The network.
        weights: transport, average, copy_previous, copy_next, half_next (B's kernels and biases
            halved, its norms kept), random (N(0, 0.02), norms 1) or predicted (`predict_block`).
        zero_init: Make the block the identity, by `identity_values`.
        transport: For `transport`: reference, barycentric, assignment or symmetric.
        epsilon: For `transport`: entropy; None takes the transport's own, for `symmetric` none.
        fusion: For `transport` and `average`: how the two are mixed (`blending.FUSIONS`).
        output_scale: Without `zero_init`: a factor on what `identity_values` would fix.
        seed: For `random`; give each new layer its own.
        lesa: For `predicted`: from `learn_block` with the same `zero_init`.

    Returns:
        The new block with every parameter of `block_specs`.

    Raises:
        UserError: What was asked for does not know all parameters of the block.
        ValueError: `weights` is not one of the names above, or `predicted` without `lesa`.
    """
    if weights == "transport":
        made = _make_by_transport(
            previous, next_, config, zero_init, transport=transport, epsilon=epsilon, fusion=fusion
        )
    else:
        block = _make_otherwise(previous, next_, config, weights, fusion, seed, lesa)
        made = Fused(block, (), {})
    block = _end_branches(made.block, config, zero_init, output_scale)
    return made._replace(block=block, pictures=_pictures(made))


def _make_by_transport(
    previous: Block,
    next_: Block,
    config: ModelConfig,
    zero_init: bool,
    *,
    transport: str,
    epsilon: float | None,
    fusion: str,
) -> Fused:
    if transport == "symmetric":
        return fuse_symmetric(previous, next_, config=config, fusion=fusion, epsilon=epsilon)
    own_epsilon = transport_epsilon(transport, epsilon)
    # Where it is zeroed its plan, on the widest matrix, would be thrown away.
    ends_in_down = any(name.endswith("down_kernel") for name in identity_values(config))
    return _transport(
        previous,
        next_,
        _Choices(transport, own_epsilon, fusion, config.norm.offset),
        config=config,
        needs_down=not (zero_init and ends_in_down),
    )


def _make_otherwise(
    previous: Block,
    next_: Block,
    config: ModelConfig,
    weights: str,
    fusion: str,
    seed: int,
    lesa: Lesa | None,
) -> dict[str, np.ndarray]:
    if weights == "average":
        return _averaged(previous, next_, fusion)
    if weights == "copy_previous":
        return dict(previous)
    if weights == "copy_next":
        return dict(next_)
    if weights == "half_next":
        return _halved(next_)
    if weights == "random":
        return _random_block(config, seed)
    if weights == "predicted" and lesa is not None:
        return predict_block(lesa, previous, next_)
    raise ValueError(f"weights={weights!r} is not a way to make a new block")
