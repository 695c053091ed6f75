"""Two adjacent blocks to one new block."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.params import block_specs, identity_values
from opt_deus_jax.transport.assignment import solve_assignment
from opt_deus_jax.transport.diagnostics import MatrixReport, report
from opt_deus_jax.transport.sinkhorn import (
    DEFAULT_RELATIVE_EPSILON,
    REFERENCE_EPSILON,
    Coupling,
    barycentric_map,
    solve_sinkhorn,
)

Block = Mapping[str, np.ndarray]


class Fused(NamedTuple):
    """A new block and what is known about its making.

    Attributes:
        block: float32 arrays by parameter name.
        reports: One per matrix that was transported.
        maps: For each of those, the map [m, n] that was applied (as map' W_A).
    """

    block: dict[str, np.ndarray]
    reports: tuple[MatrixReport, ...]
    maps: dict[str, np.ndarray]


class Aligned(NamedTuple):
    """A kernel of parent A moved onto the rows of parent B's and averaged with it."""

    coupling: Coupling
    map_MN: Float[Array, "m n"]
    fused_ND: Float[Array, "n d"]


def transport_epsilon(transport: str, epsilon: float | None) -> float:
    """The entropy that a transport runs with: the given one, or the transport's own."""
    if epsilon is not None:
        return epsilon
    return REFERENCE_EPSILON if transport == "reference" else DEFAULT_RELATIVE_EPSILON


@jax.jit
def _average(map_MN: Array, previous: Array, next_: Array) -> Array:
    moved = jnp.matmul(map_MN.T, previous, precision=jax.lax.Precision.HIGHEST)
    return (moved + next_) / 2


@jax.jit
def _move_columns(kernel_MD: Array, map_DE: Array) -> Array:
    return jnp.matmul(kernel_MD, map_DE, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=("transport", "epsilon"))
def _align_by_sinkhorn(
    previous_MD: Array, next_ND: Array, *, transport: str, epsilon: float
) -> tuple[Coupling, Array]:
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
    else:
        coupling, map_MN = _align_by_sinkhorn(
            previous_MD, next_ND, transport=transport, epsilon=epsilon
        )
    return Aligned(coupling, map_MN, _average(map_MN, previous_MD, next_ND))


def _is_norm(name: str) -> bool:
    return name.endswith("_norm")


def _shifted(block: Mapping[str, Array], offset: float) -> dict[str, Array]:
    """Scales of norms as they are applied, or with the negative offset as they are stored."""
    if not offset:
        return dict(block)
    return {name: value + offset if _is_norm(name) else value for name, value in block.items()}


def _transport(
    previous: Block,
    next_: Block,
    *,
    transport: str,
    epsilon: float | None,
    norm_offset: float,
    needs_down: bool,
) -> Fused:
    """OpT-DeUS, in the order of its authors' code (Cao et al. 2025; DESIGN, section 2).

    Norms that Llama does not have are averaged; those of whole projections follow their rows.
    """
    a, b = (
        _shifted({name: jnp.asarray(value) for name, value in block.items()}, norm_offset)
        for block in (previous, next_)
    )
    fused = {name: (a[name] + b[name]) / 2 for name in a if _is_norm(name)}
    reports: list[MatrixReport] = []
    maps: dict[str, Array] = {}

    def fuse(name: str, kernel_a: Array) -> None:
        kernel_b = b[f"{name}_kernel"]
        aligned = align(
            kernel_a,
            kernel_b,
            transport=transport,
            epsilon=transport_epsilon(transport, epsilon),
        )
        maps[name] = aligned.map_MN
        fused[f"{name}_kernel"] = aligned.fused_ND
        reports.append(report(name, aligned.coupling, aligned.fused_ND, kernel_a, kernel_b))
        for row_name in (f"{name}_bias", f"{name}_norm"):
            if row_name in a and a[row_name].size == kernel_a.shape[0]:
                columns = (a[row_name][:, None], b[row_name][:, None])
                fused[row_name] = _average(aligned.map_MN, *columns)[:, 0]

    for name in ("query", "key", "value", "output"):
        fuse(name, a[f"{name}_kernel"])
    output_map = maps["output"]
    if "post_attention_norm" in a:
        moved_norm = _move_columns(a["post_attention_norm"][None], output_map)[0]
        norm_a = (moved_norm + a["post_attention_norm"]) / 2
        fused["post_attention_norm"] = (norm_a + b["post_attention_norm"]) / 2
    for name in ("gate", "up"):
        fuse(name, _move_columns(a[f"{name}_kernel"], output_map))
    if needs_down:
        fuse("down", a["down_kernel"])
    block = {name: np.asarray(value) for name, value in _shifted(fused, -norm_offset).items()}
    return Fused(block, tuple(reports), {name: np.asarray(m) for name, m in maps.items()})


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


def fuse_blocks(
    previous: Block,
    next_: Block,
    *,
    config: ModelConfig,
    weights: str,
    zero_init: bool,
    transport: str = "barycentric",
    epsilon: float | None = None,
    seed: int = 0,
) -> Fused:
    """Makes a new block from its parents.

    Args:
        previous: Parent A, float32 arrays by the names of `block_specs`.
        next_: Parent B, likewise.
        config: The network.
        weights: transport, average, copy_previous, copy_next, half_next (B's kernels and biases
            halved, its norms kept) or random (N(0, 0.02), norms 1).
        zero_init: Make the block the identity, by `identity_values`.
        transport: For `transport`: reference, barycentric or assignment.
        epsilon: For `transport`: entropy; None takes the transport's own.
        seed: For `random`; give each new layer its own.

    Returns:
        The new block with every parameter of `block_specs`.

    Raises:
        ValueError: `weights` is not one of the names above.
    """
    fused, fixed = Fused({}, (), {}), identity_values(config) if zero_init else {}
    block: dict[str, np.ndarray]
    if weights == "transport":
        fused = _transport(
            previous,
            next_,
            transport=transport,
            epsilon=epsilon,
            norm_offset=config.norm.offset,
            # Where it is zeroed its plan, on the widest matrix, would be thrown away.
            needs_down="down_kernel" not in fixed,
        )
        block = fused.block
    elif weights == "average":
        block = {name: (previous[name] + next_[name]) / 2 for name in previous}
    elif weights == "copy_previous":
        block = dict(previous)
    elif weights == "copy_next":
        block = dict(next_)
    elif weights == "half_next":
        block = _halved(next_)
    elif weights == "random":
        block = _random_block(config, seed)
    else:
        raise ValueError(f"weights={weights!r} is not a way to make a new block")
    specs = block_specs(config)
    block |= {k: np.full(specs[k].shape, value, np.float32) for k, value in fixed.items()}
    return fused._replace(block=block)
