"""The search for a learning rate: up and down by a factor until the best is bracketed."""

import math
from collections.abc import Mapping


def next_exponent(losses: Mapping[int, float], furthest: int) -> int | None:
    """Which rate to try next.

    Args:
        losses: By exponent k, the loss after training at `start * factor**k`.
        furthest: Largest absolute exponent.

    Returns:
        An exponent that was not tried; None where the best one has a worse one on both sides, or
        lies at `furthest`.
    """
    if not losses:
        return 0
    best = best_exponent(losses)
    for neighbour in (best - 1, best + 1):
        if neighbour not in losses and abs(neighbour) <= furthest:
            return neighbour
    return None


def best_exponent(losses: Mapping[int, float]) -> int:
    """The exponent of the lowest loss; of equal ones the lowest rate; NaN is the worst."""

    def loss(exponent: int) -> float:
        return math.inf if math.isnan(losses[exponent]) else losses[exponent]

    return min(sorted(losses), key=loss)
