"""MLP neurons of one block matched with those of another, as far as functions allow it.

A gated neuron, silu(g x) (u x) d, may stand anywhere, and changes nothing when the signs of u and d
are flipped together; g's may not, because of the silu. It could also be scaled in u against d: left
out, since the balance of adjacent layers is nearly the same.

Names carry shapes: M neurons, D columns.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from opt_deus_jax.transport.assignment import assign_by_gain
from opt_deus_jax.upscaling.features import NEURON_MATRICES, Features
from opt_deus_jax.upscaling.heads import scale_to_unit


class NeuronMatch(NamedTuple):
    """Which neurons of A stand for B's.

    Attributes:
        source_M: For each neuron of B its neuron of A.
        sign_M: 1, or -1 where the neuron of A is flipped.
        mean_cost: Mean distance of a neuron of A from one of B, each pair at its better sign.
        matched_cost: The same of the matched ones.
    """

    source_M: Int[np.ndarray, " m"]
    sign_M: Float[np.ndarray, " m"]
    mean_cost: float
    matched_cost: float


def match_neurons(a: Features, b: Features) -> NeuronMatch:
    """Finds the signed permutation of A's neurons that is nearest to B's, over gate, up and down.

    Each matrix is scaled to norm 1 first; the sum of squared distances is then least, exactly.

    Args:
        a: Features of A by `NEURON_MATRICES`.
        b: Features of B.

    Returns:
        The match.
    """
    a, b = ({name: scale_to_unit(rows[name]) for name in NEURON_MATRICES} for rows in (a, b))
    gain_MM = a["up"] @ b["up"].T
    gain_MM += a["down"] @ b["down"].T
    np.abs(gain_MM, out=gain_MM)
    gain_MM += a["gate"] @ b["gate"].T
    source_M = assign_by_gain(gain_MM)
    flippable_M = sum((a[name][source_M] * b[name]).sum(axis=1) for name in ("up", "down"))
    square_a, square_b = (sum((x**2).sum(axis=1) for x in rows.values()) for rows in (a, b))
    # In place: with the neurons of an 8B model the table takes 0.8 GB.
    gain_MM *= -2
    gain_MM += square_a[:, None]  # pyright: ignore[reportIndexIssue]
    gain_MM += square_b[None]  # pyright: ignore[reportIndexIssue]
    cost_MM = np.sqrt(np.maximum(gain_MM, 0, out=gain_MM), out=gain_MM)
    return NeuronMatch(
        source_M=source_M,
        sign_M=np.where(flippable_M < 0, -1, 1).astype(np.float32),
        mean_cost=float(cost_MM.mean(dtype=np.float64)),
        matched_cost=float(cost_MM[source_M, np.arange(len(source_M))].mean(dtype=np.float64)),
    )


def neuron_maps(match: NeuronMatch) -> dict[str, sparse.csr_array]:
    """Writes a match as maps between rows of features; moving A by them leaves its function alone.

    Args:
        match: From `match_neurons`.

    Returns:
        By matrix name, [m, n], to be applied as `map.T @ rows of A`.
    """
    size = len(match.source_M)
    places = (match.source_M, np.arange(size))
    signed = sparse.csr_array((match.sign_M, places), shape=(size, size))
    return {"gate": abs(signed), "up": signed, "down": signed}
