"""The rows of one kernel, moved onto those of another."""

import functools
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from opt_deus_jax.transport.assignment import solve_assignment
from opt_deus_jax.transport.plan import Coupling, Plan, is_wide, move_rows
from opt_deus_jax.transport.sinkhorn import barycentric_map, solve_sinkhorn
from opt_deus_jax.transport.wide import solve_wide


class Aligned(NamedTuple):
    """A kernel of parent A moved onto the rows of parent B's and averaged with it."""

    coupling: Coupling
    map_MN: Plan
    fused_ND: Float[Array, "n d"]


@jax.jit
def average_aligned(map_MN: Plan, previous: Array, next_: Array) -> Array:
    """Moves what A has by rows onto B's rows and averages the two."""
    return (move_rows(map_MN, previous) + next_) / 2


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
        transport: `reference` (the authors'), `barycentric` or `assignment`.
        epsilon: Entropy; absolute for `reference`, relative to the mean cost for `barycentric`,
            unused for `assignment`.

    Returns:
        The coupling, the map that was applied and the fused kernel.

    Raises:
        ValueError: `transport` is none of these.
    """
    if transport not in ("reference", "barycentric", "assignment"):
        raise ValueError(f"transport={transport!r} does not move the rows of one kernel")
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
    return Aligned(coupling, map_MN, average_aligned(map_MN, previous_MD, next_ND))
