"""Attention in trees against the reference with the whole mask."""

import jax.numpy as jnp
import numpy as np
import pytest

from opt_deus_jax.models.attention import reference_attention
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


# The last one is long enough for the larger blocks.
@pytest.mark.parametrize(("batch", "length"), [(2, 96), (1, 300), (1, 2100)])
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
    positions_BT = jnp.zeros((batch, length), jnp.int32)
    found = tree_attention(query, key, value, jnp.asarray(ends_BT), positions_BT)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
