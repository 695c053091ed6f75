"""Two adjacent blocks to one new block."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.params import block_specs, identity_values
from opt_deus_jax.transport.assignment import solve_assignment
from opt_deus_jax.transport.diagnostics import MapPicture, MatrixReport, picture_of, report
from opt_deus_jax.transport.plan import (
    Coupling,
    Plan,
    ScaledKernel,
    is_wide,
    move_columns,
    move_rows,
)
from opt_deus_jax.transport.sinkhorn import (
    DEFAULT_RELATIVE_EPSILON,
    REFERENCE_EPSILON,
    barycentric_map,
    solve_sinkhorn,
)
from opt_deus_jax.transport.wide import solve_wide
from opt_deus_jax.upscaling.blending import restore_rows
from opt_deus_jax.upscaling.conditioning import balance_branches, scale_branches
from opt_deus_jax.upscaling.experts import EXPERT_PARAMETERS, fuse_experts
from opt_deus_jax.upscaling.features import shift_norms
from opt_deus_jax.upscaling.lesa import Lesa, predict_block
from opt_deus_jax.upscaling.new_block import Block, Fused
from opt_deus_jax.upscaling.symmetric import fuse_symmetric
from opt_deus_jax.upscaling.twin import twin_block


class Aligned(NamedTuple):
    """A kernel of parent A moved onto the rows of parent B's and averaged with it."""

    coupling: Coupling
    map_MN: Plan
    fused_ND: Float[Array, "n d"]


def transport_epsilon(transport: str, epsilon: float | None) -> float:
    """The entropy that a transport runs with: the given one, or the transport's own."""
    if epsilon is not None:
        return epsilon
    return REFERENCE_EPSILON if transport == "reference" else DEFAULT_RELATIVE_EPSILON


@jax.jit
def _average(map_MN: Plan, previous: Array, next_: Array) -> Array:
    return (move_rows(map_MN, previous) + next_) / 2


_move_columns = jax.jit(move_columns)


@functools.partial(jax.jit, static_argnames=("transport", "epsilon"))
def _align_by_sinkhorn(
    previous_MD: Array, next_ND: Array, *, transport: str, epsilon: float
) -> tuple[Coupling, Plan]:
    relative = transport == "barycentric"
    coupling = solve_sinkhorn(previous_MD, next_ND, epsilon=epsilon, relative=relative)
    # The authors apply the coupling itself, whose columns sum to 1/n.
    return coupling, barycentric_map(coupling) if relative else coupling.plan_MN


def align(
    previous_MD: Float[Array, "m d"],
    next_ND: Float[Array, "n d"],
    *,
    transport: str,
    epsilon: float,
) -> Aligned:
    """Transports the rows of A's kernel onto B's and averages: (T' W_A + W_B) / 2.

    Compiled once per pair of shapes.

    Args:
        previous_MD: A's kernel, float32 [out, in].
        next_ND: B's kernel, float32 [out, in].
        transport: `reference`, `barycentric` or `assignment` (DESIGN, section 2).
        epsilon: Entropy; absolute for `reference`, relative to the mean cost for `barycentric`,
            unused for `assignment`.

    Returns:
        The coupling, the map that was applied and the fused kernel.
    """
    if transport == "assignment":
        coupling = solve_assignment(previous_MD, next_ND)
        map_MN = barycentric_map(coupling)
    elif is_wide(len(previous_MD), len(next_ND)):
        relative = transport == "barycentric"
        coupling = solve_wide(previous_MD, next_ND, epsilon=epsilon, relative=relative)
        map_MN = barycentric_map(coupling) if relative else coupling.plan_MN
    else:
        coupling, map_MN = _align_by_sinkhorn(
            previous_MD, next_ND, transport=transport, epsilon=epsilon
        )
    return Aligned(coupling, map_MN, _average(map_MN, previous_MD, next_ND))


def _is_norm(name: str) -> bool:
    return name.endswith("_norm")


def _transport(
    previous: Block,
    next_: Block,
    *,
    transport: str,
    epsilon: float | None,
    fusion: str,
    config: ModelConfig,
    needs_down: bool,
) -> Fused:
    """OpT-DeUS, in the order of its authors' code (Cao et al. 2025; DESIGN, section 2).

    Norms that Llama does not have are averaged; those of whole projections follow their rows.
    Experts are matched first, then fused in pairs like MLPs.
    """
    norm_offset = config.norm.offset

    def read(block: Block, name: str) -> Array:
        # One at a time: a block of an 8B model takes 0.9 GB in float32.
        offset = norm_offset if _is_norm(name) else 0.0
        return jnp.asarray(block[name] + np.float32(offset) if offset else block[name])

    fused = {
        name: (read(previous, name) + read(next_, name)) / 2 for name in previous if _is_norm(name)
    }
    reports: list[MatrixReport] = []
    maps: dict[str, Plan] = {}
    pictures: dict[str, MapPicture] = {}

    def fuse_pair(name: str, kernel_a: Array, kernel_b: Array) -> tuple[Array, Plan, MatrixReport]:
        aligned = align(
            kernel_a,
            kernel_b,
            transport=transport,
            epsilon=transport_epsilon(transport, epsilon),
        )
        fused_kernel = aligned.fused_ND
        if fusion == "rescaled":
            fused_kernel = jnp.asarray(restore_rows(*map(np.asarray, (fused_kernel, kernel_b))))
        line = report(name, aligned.coupling, fused_kernel, kernel_a, kernel_b)
        return fused_kernel, aligned.map_MN, line

    def fuse(name: str, kernel_a: Array) -> None:
        kernel, map_MN, line = fuse_pair(name, kernel_a, read(next_, f"{name}_kernel"))
        fused[f"{name}_kernel"] = kernel
        reports.append(line)
        for row_name in (f"{name}_bias", f"{name}_norm"):
            if row_name in previous and previous[row_name].size == kernel_a.shape[0]:
                columns = (read(block, row_name)[:, None] for block in (previous, next_))
                fused[row_name] = _average(map_MN, *columns)[:, 0]
        pictures[name] = picture_of(map_MN, line.match_order)
        # Others need that of output. The rest are for callers, who can do without wide ones.
        if name == "output" or not is_wide(*map_MN.shape):
            maps[name] = map_MN

    def fuse_expert(name: str, kernel_a: Array, kernel_b: Array) -> tuple[Array, MatrixReport]:
        moved = kernel_a if name == "down" else _move_columns(kernel_a, output_map)
        kernel, _, line = fuse_pair(name, moved, kernel_b)
        return kernel, line

    for name in ("query", "key", "value", "output"):
        fuse(name, read(previous, f"{name}_kernel"))
    output_map = maps["output"]
    if "post_attention_norm" in previous:
        norm_a = read(previous, "post_attention_norm")
        moved_norm = _move_columns(norm_a[None], output_map)[0]
        norm_a = (moved_norm + norm_a) / 2
        norm = (norm_a + read(next_, "post_attention_norm")) / 2
        fused["post_attention_norm"] = norm
    if "router_kernel" in previous:
        matrices = ("gate", "up", "down") if needs_down else ("gate", "up")
        read_by_experts = ("post_attention_norm", *EXPERT_PARAMETERS)
        a, b = ({k: read(block, k) for k in read_by_experts} for block in (previous, next_))
        kernels, lines, map_EE = fuse_experts(a, b, config, matrices, fusion, fuse_expert)
        fused |= kernels
        maps["router"] = jnp.asarray(map_EE)
        pictures["router"] = picture_of(maps["router"], lines[0].match_order)
        reports += lines
    else:
        for name in ("gate", "up"):
            fuse(name, _move_columns(read(previous, f"{name}_kernel"), output_map))
        if needs_down:
            fuse("down", read(previous, "down_kernel"))
    block = {name: np.asarray(value) for name, value in fused.items()}
    return Fused(
        shift_norms(block, -norm_offset),
        tuple(reports),
        {name: np.asarray(m) for name, m in maps.items() if not isinstance(m, ScaledKernel)},
        pictures,
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
    # Norms are kept: the authors' fused norms are near the parents' mean, only kernels are halved.
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
    branch_scale: float = 1.0,
    balance: bool = False,
    seed: int = 0,
    lesa: Lesa | None = None,
) -> Fused:
    """Makes a new block from its parents.

    Args:
        previous: Parent A, float32 arrays by the names of `block_specs`.
        next_: Parent B, likewise.
        config: The network.
        weights: transport, average, copy_previous, copy_next, half_next (B's kernels and biases
            halved, its norms kept), random (N(0, 0.02), norms 1), twin (`twin_block`) or predicted
            (`predict_block`).
        zero_init: Make the block the identity, by `identity_values`.
        transport: For `transport`: reference, barycentric, assignment or symmetric.
        epsilon: For `transport`: entropy; None takes the transport's own, for `symmetric` none.
        fusion: For `transport` and `average`: how the two are mixed (`blending.FUSIONS`).
        output_scale: Without `zero_init`: a factor on what `identity_values` would fix.
        branch_scale: See `scale_branches`.
        balance: With `zero_init`: see `balance_branches`.
        seed: For `random`; give each new layer its own.
        lesa: For `predicted`: from `learn_block` with the same `zero_init`.

    Returns:
        The new block with every parameter of `block_specs`.

    Raises:
        UserError: What was asked for does not know all parameters of the block.
        ValueError: `weights` is not one of the names above, or `predicted` without `lesa`.
    """
    made = _make(
        previous,
        next_,
        config=config,
        weights=weights,
        zero_init=zero_init,
        transport=transport,
        epsilon=epsilon,
        fusion=fusion,
        seed=seed,
        lesa=lesa,
    )
    block = _end_branches(made.block, config, zero_init, output_scale)
    if balance:
        block = balance_branches(block, config)
    if branch_scale != 1:
        block = scale_branches(block, branch_scale)
    order = {line.name: line.match_order for line in made.reports}
    pictures = made.pictures or {
        name: picture_of(m, order[name]) for name, m in made.maps.items() if name in order
    }
    return made._replace(block=block, pictures=pictures)


def _make(
    previous: Block,
    next_: Block,
    *,
    config: ModelConfig,
    weights: str,
    zero_init: bool,
    transport: str,
    epsilon: float | None,
    fusion: str,
    seed: int,
    lesa: Lesa | None,
) -> Fused:
    """The new block before its ends are zeroed or scaled."""
    if weights == "transport" and transport == "symmetric":
        return fuse_symmetric(previous, next_, config=config, fusion=fusion, epsilon=epsilon)
    if weights == "transport":
        return _transport(
            previous,
            next_,
            transport=transport,
            epsilon=epsilon,
            fusion=fusion,
            config=config,
            # Where it is zeroed its plan, on the widest matrix, would be thrown away.
            needs_down=not (
                zero_init and any(name.endswith("down_kernel") for name in identity_values(config))
            ),
        )
    if weights == "average":
        block = _averaged(previous, next_, fusion)
    elif weights == "copy_previous":
        block = dict(previous)
    elif weights == "copy_next":
        block = dict(next_)
    elif weights == "half_next":
        block = _halved(next_)
    elif weights == "random":
        block = _random_block(config, seed)
    elif weights == "twin":
        block = twin_block(next_, config)
    elif weights == "predicted" and lesa is not None:
        block = predict_block(lesa, previous, next_)
    else:
        raise ValueError(f"weights={weights!r} is not a way to make a new block")
    return Fused(block, (), {})
