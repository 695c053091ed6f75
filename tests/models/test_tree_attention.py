"""Attention in trees against the reference with the whole mask."""

import jax.numpy as jnp
import numpy as np
import pytest

from opt_deus_jax.models.attention import Scoring, reference_attention
from opt_deus_jax.models.tree_attention import tree_attention


def _ends(draw: np.random.Generator, length: int) -> np.ndarray:
    """A random forest in depth-first order: each token's parent is on the path of the last one."""
    ends, path = np.zeros(length, np.int32), []
    for place in range(length):
        keep = int(draw.integers(0, len(path) + 1)) if draw.random() < 0.1 else len(path)
        ends[path[keep:]] = place
        path = [*path[:keep], place]
    ends[path] = length
    return ends


# The last two are long enough for larger blocks.
@pytest.mark.parametrize(("batch", "length"), [(2, 96), (2, 300), (1, 700), (1, 2100)])
def test_equals_the_reference(batch: int, length: int) -> None:
    draw = np.random.default_rng(length)
    query, key, value = (
        jnp.asarray(draw.normal(size=(batch, length, heads, 8)), jnp.float32) for heads in (4, 2, 2)
    )
    ends_BT = np.stack([_ends(draw, length) for _ in range(batch)])
    places = np.arange(length)
    allowed = (places[None, None] <= places[None, :, None]) & (
        places[None, :, None] < ends_BT[:, None]
    )
    assert not allowed.all(axis=(0, 2)).any()
    expected = reference_attention(query, key, value, jnp.asarray(allowed))
    # A token's depth is the number of tokens before it that see it.
    positions_BT = allowed.sum(axis=-1, dtype=np.int32) - 1
    trees = jnp.asarray(ends_BT), jnp.asarray(positions_BT)
    found = tree_attention(query, key, value, *trees)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    if length == 300:
        near = allowed & (positions_BT[:, :, None] - positions_BT[:, None] < 7)
        assert near.sum() < allowed.sum() / 2
        expected = reference_attention(
            query, key, value, jnp.asarray(near), scale=0.3, soft_cap=1.5
        )
        found = tree_attention(query, key, value, *trees, Scoring(0.3, 1.5, 7))
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [700, 2100])
@pytest.mark.parametrize("part", [0.6, 1], ids=("a_beginning_in_common", "one_text"))
def test_blocks_that_all_see_equal_the_reference(part: float, length: int) -> None:
    shared = int(part * length)
    draw = np.random.default_rng(shared)
    middle = (shared + length) // 2
    query, key, value = (
        jnp.asarray(draw.normal(size=(1, length, heads, 8)), jnp.float32) for heads in (4, 2, 2)
    )
    places = np.arange(length)
    ends_T = np.where((places >= shared) & (places < middle), middle, length).astype(np.int32)
    allowed = (places[None] <= places[:, None]) & (places[:, None] < ends_T[None])
    expected = reference_attention(query, key, value, jnp.asarray(allowed[None]))
    positions_T = allowed.sum(axis=-1, dtype=np.int32) - 1
    found = tree_attention(query, key, value, jnp.asarray(ends_T[None]), positions_T[None])
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
