"""MLP neurons of one block matched with those of another, as far as functions allow it.

A gated neuron, silu(g x) (u x) d, may stand anywhere, and changes nothing when the signs of u and d
are flipped together; g's may not, because of the silu. It could also be scaled in u against d: left
out, since in five gaps of SmolLM2-135M it moved no cosine of matched kernels by more than 0.005.

Names carry shapes: M neurons, D columns.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy import sparse

from opt_deus_jax.transport.assignment import assign_by_gain
from opt_deus_jax.transport.sinkhorn import barycentric_map, solve_sinkhorn_for_cost
from opt_deus_jax.upscaling.features import NEURON_MATRICES, Features, UnitMatch


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
    gain_MM = overlap(a["up"], b["up"])
    gain_MM += overlap(a["down"], b["down"])
    negative_MM = gain_MM < 0
    np.abs(gain_MM, out=gain_MM)
    gain_MM += overlap(a["gate"], b["gate"])
    if epsilon is not None:
        return _soft_match(_square_distances(gain_MM, a, b), negative_MM, epsilon)
    source_M = assign_by_gain(gain_MM)
    pairs = (source_M, np.arange(len(source_M)))
    sign_M = np.where(negative_MM[pairs], -1, 1).astype(np.float32)
    signed = sparse.csr_array((sign_M, pairs), shape=gain_MM.shape)
    square_MM = _square_distances(gain_MM, a, b)
    cost_MM = np.sqrt(square_MM, out=square_MM)
    return UnitMatch(
        maps={"gate": abs(signed), "up": signed, "down": signed},
        source_U=source_M,
        mean_cost=float(cost_MM.mean(dtype=np.float64)),
        matched_cost=float(cost_MM[pairs].mean(dtype=np.float64)),
    )


# Tables of all pairs are made in place: with the neurons of an 8B model one takes 0.8 GB.
def overlap(
    rows_a: Float[np.ndarray, "m d"], rows_b: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, "m n"]:
    """Inner products of all rows, both matrices scaled to norm 1; zeros stay zeros.

    Args:
        rows_a: Features of A.
        rows_b: Features of B.

    Returns:
        A row for each of A's, a column for each of B's.
    """
    table_MM = rows_a @ rows_b.T
    table_MM *= np.float32(1 / (float(np.linalg.norm(rows_a) * np.linalg.norm(rows_b)) or 1))
    return table_MM


def _square_norms(features: Features) -> np.ndarray:
    squares = [np.einsum("md,md->m", features[name], features[name]) for name in NEURON_MATRICES]
    return np.sum([square / (square.sum() or 1) for square in squares], axis=0)


def _square_distances(gain_MM: np.ndarray, a: Features, b: Features) -> np.ndarray:
    square_a, square_b = _square_norms(a), _square_norms(b)
    gain_MM *= -2
    gain_MM += square_a[:, None]
    gain_MM += square_b[None]
    return np.maximum(gain_MM, 0, out=gain_MM)


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
