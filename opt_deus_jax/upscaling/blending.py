"""How much of A and of B goes into each feature of a fused block, once A lies on B."""

import numpy as np
from jaxtyping import Float

from opt_deus_jax.upscaling.features import Features

FUSIONS = ("mean", "rescaled", "matched", "select")


def unit_cosines(moved: Features, next_: Features, units: int) -> Float[np.ndarray, " u"]:
    """Cosine between each unit of A and the unit of B it lies on, over all their matrices.

    Args:
        moved: A's features, in the places of B's.
        next_: B's features.
        units: How many heads, groups or neurons the rows of every matrix are divided into.

    Returns:
        One a unit; each matrix weighs the same, whatever its size.
    """
    overlap, square_a, square_b = np.zeros((3, units))
    for name, rows_a in moved.items():
        rows_a, rows_b = (rows.reshape(units, -1) for rows in (rows_a, next_[name]))
        inner, of_a, of_b = (
            np.einsum("ud,ud->u", *pair)
            for pair in ((rows_a, rows_b), (rows_a, rows_a), (rows_b, rows_b))
        )
        weight_a, weight_b = (float(squares.sum()) or 1.0 for squares in (of_a, of_b))
        overlap += inner / np.sqrt(weight_a * weight_b)
        square_a += of_a / weight_a
        square_b += of_b / weight_b
    size = np.sqrt(square_a * square_b)
    return overlap / np.where(size > 0, size, 1)


def importance(features: Features, units: int) -> Float[np.ndarray, " u"]:
    """Strength by the weights alone, in robust deviations from the median, folded back above one.

    The strongest of all are those with massive activations (Sun et al. 2024, arXiv 2402.17762), of
    which a second copy does harm: strength counts for a unit up to one deviation only.

    Args:
        features: Rows by matrix name.
        units: How many heads, groups or neurons the rows of every matrix are divided into.

    Returns:
        One a unit, at most 1.
    """
    strength = np.zeros(units)
    for rows in features.values():
        norm = np.linalg.norm(rows.reshape(units, -1), axis=1)
        strength += np.log(np.maximum(norm, np.finfo(np.float32).tiny))
    centred = strength - np.median(strength)
    spread = 1.4826 * np.median(np.abs(centred))
    return 1 - np.abs(centred / (spread or 1.0) - 1)


def shares_of_previous(
    fusion: str, moved: Features, next_: Features, units: int
) -> Float[np.ndarray, " u"]:
    """The share of A in each unit of the fused block, from 0 to 1.

    Args:
        fusion: `mean` and `rescaled`: a half. `matched`: half the cosine of the matched pair, so
            that equals are averaged and a unit without a match is B's whole. `select`: 1 for the
            half of the units in which A's is the more important of the pair, 0 for the others; as
            only one of a pair is taken, what both have is not taken twice.
        moved: A's features, in the places of B's.
        next_: B's features.
        units: How many heads, groups or neurons there are.

    Returns:
        One a unit.

    Raises:
        ValueError: `fusion` is not one of these.
    """
    if fusion in ("mean", "rescaled"):
        return np.full(units, 0.5)
    if fusion == "matched":
        return np.clip(unit_cosines(moved, next_, units), 0, 1) / 2
    if fusion == "select":
        advantage = importance(moved, units) - importance(next_, units)
        shares = np.zeros(units)
        shares[np.argsort(-advantage, kind="stable")[: units // 2]] = 1
        return shares
    raise ValueError(f"fusion={fusion!r} is none of {', '.join(FUSIONS)}")


def restore_rows(
    fused: Float[np.ndarray, "*e n d"], next_: Float[np.ndarray, "*e n d"]
) -> Float[np.ndarray, "*e n d"]:
    """Scales each row to the norm of B's; a row of zeros stays one."""
    norm, wanted = (np.linalg.norm(rows, axis=-1, keepdims=True) for rows in (fused, next_))
    return fused * (wanted / np.where(norm > 0, norm, 1))


def blend_rows(
    fusion: str,
    moved: Float[np.ndarray, "n d"],
    next_: Float[np.ndarray, "n d"],
    share: Float[np.ndarray, " u"],
) -> Float[np.ndarray, "n d"]:
    """Mixes a matrix of A with B's by the share of each unit.

    Args:
        fusion: See `shares_of_previous`; `rescaled` and `matched` give every row the norm of B's.
        moved: A's rows, in the places of B's.
        next_: B's rows.
        share: Of A, a unit.

    Returns:
        The fused rows.
    """
    share_N1 = np.repeat(share, len(next_) // len(share)).astype(np.float32)[:, None]
    fused = share_N1 * moved
    fused += (1 - share_N1) * next_
    return restore_rows(fused, next_) if fusion in ("rescaled", "matched") else fused
