"""The search for a learning rate."""

import math
from collections.abc import Callable

import pytest

from opt_deus_jax.comparison.sweep import best_exponent, next_exponent


def _search(loss: Callable[[int], float], furthest: int) -> dict[int, float]:
    losses: dict[int, float] = {}
    while (exponent := next_exponent(losses, furthest)) is not None:
        assert exponent not in losses
        losses[exponent] = loss(exponent)
    return losses


@pytest.mark.parametrize("best", [-3, -2, -1, 0, 1, 2, 3])
def test_it_ends_at_the_lowest_of_a_valley_with_worse_ones_beside_it(best: int):
    losses = _search(lambda exponent: (exponent - best) ** 2, 5)
    assert best_exponent(losses) == best
    assert {best - 1, best, best + 1} <= losses.keys()
    # Down first; where that is better, nothing is tried upwards.
    assert len(losses) == (3 + best if best >= 0 else 2 - best)


@pytest.mark.parametrize("furthest", [0, 1, 2])
def test_it_goes_no_further_than_it_may(furthest: int):
    losses = _search(lambda exponent: -exponent, furthest)
    assert best_exponent(losses) == furthest
    assert set(losses) == {k for k in (-1, *range(furthest + 1)) if abs(k) <= furthest}


def test_of_equal_losses_the_lowest_rate_is_taken():
    assert best_exponent({1: 2.0, 0: 2.0, -1: math.inf}) == 0


def test_what_diverged_is_never_the_best():
    assert best_exponent({-1: math.nan, 0: 2.0, 1: math.nan}) == 0
