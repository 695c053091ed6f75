"""MLP neurons of one block matched with those of another, as far as functions allow it.

A gated neuron, silu(g x) (u x) d, may stand anywhere, and changes nothing when the signs of u and d
are flipped together; g's may not, because of the silu. It could also be scaled in u against d: left
out, since in five gaps of SmolLM2-135M it moved no cosine of matched kernels by more than 0.005.

Names carry shapes: M neurons, D columns.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy import sparse

from opt_deus_jax.transport.assignment import assign_by_cost
from opt_deus_jax.transport.sinkhorn import barycentric_map, solve_sinkhorn_for_cost
from opt_deus_jax.upscaling.features import Features, UnitMatch

_ROWS_AT_ONCE = 1024


def match_neurons(a: Features, b: Features, epsilon: float | None = None) -> UnitMatch:
    """Finds the signed permutation of A's neurons that is nearest to B's, over gate, up and down.

    Each matrix is scaled to norm 1 first; the sum of squared distances is then least, exactly.

    Args:
        a: Features of A by `NEURON_MATRICES`.
        b: Features of B.
        epsilon: Entropy over the mean squared distance of two neurons, each pair at its better
            sign: every neuron of B then gets an average of A's, by Sinkhorn. None: exact.

    Returns:
        The match.
    """
    square_MM, negative_MM = _square_distances(a, b)
    if epsilon is not None:
        return _soft_match(square_MM.astype(np.float32), negative_MM, epsilon)
    source_M = assign_by_cost(square_MM)
    cost_MM = np.sqrt(square_MM, out=square_MM)
    pairs = (source_M, np.arange(len(source_M)))
    sign_M = np.where(negative_MM[pairs], -1, 1).astype(np.float32)
    signed = sparse.csr_array((sign_M, pairs), shape=negative_MM.shape)
    return UnitMatch(
        maps={"gate": abs(signed), "up": signed, "down": signed},
        source_U=source_M,
        mean_cost=float(cost_MM.mean(dtype=np.float64)),
        matched_cost=float(cost_MM[pairs].mean(dtype=np.float64)),
    )


def _square_distances(a: Features, b: Features) -> tuple[np.ndarray, np.ndarray]:
    """Of all pairs at the better sign, float64, and where that is the negative one.

    With the neurons of an 8B model the two take 1.8 GB: no other table of all pairs is made beside
    them, and of the features a matrix of either side is in memory at a time.
    """
    up_a, up_b = a["up"], b["up"]
    gain_MM = np.zeros((len(up_a), len(up_b)))
    squares = [add_overlap(gain_MM, up_a, up_b)]
    del up_a, up_b
    squares.append(add_overlap(gain_MM, a["down"], b["down"]))
    negative_MM = gain_MM < 0
    np.abs(gain_MM, out=gain_MM)
    squares.append(add_overlap(gain_MM, a["gate"], b["gate"]))
    return turn_into_square_distances(gain_MM, squares), negative_MM


def add_overlap(
    table_MN: Float[np.ndarray, "m n"],
    rows_a: Float[np.ndarray, "m d"],
    rows_b: Float[np.ndarray, "n d"],
) -> Float[np.ndarray, "2 m"]:
    """Adds the inner products of all rows, both matrices scaled to norm 1; zeros stay zeros.

    Args:
        table_MN: float64, changed in place, some rows at a time.
        rows_a: Features of A.
        rows_b: Features of B, as many.

    Returns:
        The square norms of A's rows and of B's, scaled alike.
    """
    squares = np.stack([np.einsum("md,md->m", rows, rows) for rows in (rows_a, rows_b)])
    squares = squares.astype(np.float64)
    totals = squares.sum(axis=1, keepdims=True)
    totals[totals == 0] = 1
    scale = np.float32(1 / np.sqrt(totals.prod()))
    for first in range(0, len(rows_a), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        table_MN[part] += rows_a[part] @ rows_b.T * scale
    return squares / totals


def turn_into_square_distances(
    overlap_MN: Float[np.ndarray, "m n"], squares: Sequence[Float[np.ndarray, "2 m"]]
) -> Float[np.ndarray, "m n"]:
    """Turns sums of inner products into squared distances, in place.

    Args:
        overlap_MN: What `add_overlap` has added up.
        squares: What it returned each time.

    Returns:
        The same table.
    """
    square_a, square_b = np.sum(squares, axis=0)
    overlap_MN *= -2
    overlap_MN += square_a[:, None]
    overlap_MN += square_b[None]
    return np.maximum(overlap_MN, 0, out=overlap_MN)


def _soft_match(square_MM: np.ndarray, negative_MM: np.ndarray, epsilon: float) -> UnitMatch:
    coupling = solve_sinkhorn_for_cost(jnp.asarray(square_MM), epsilon=epsilon, relative=True)
    cost_MM = np.sqrt(square_MM)
    plan_MM = np.asarray(coupling.plan_MN)
    mean_cost = cost_MM.mean(dtype=np.float64)
    matched_cost = (plan_MM * cost_MM).sum(dtype=np.float64)
    map_MM = np.asarray(barycentric_map(coupling))
    signed = np.where(negative_MM, -map_MM, map_MM)
    return UnitMatch(
        maps={"gate": map_MM, "up": signed, "down": signed},
        source_U=map_MM.argmax(axis=0),
        mean_cost=float(mean_cost),
        matched_cost=float(matched_cost),
        # Distances, as every other transport reports them.
        coupling=coupling._replace(
            mean_cost=jnp.float32(mean_cost), matched_cost=jnp.float32(matched_cost)
        ),
    )
