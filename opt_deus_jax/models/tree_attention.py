"""Attention in rows that hold several sequences as a tree, without all scores in memory."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from opt_deus_jax.models.attention import PLAIN, Scoring, cap_softly
from opt_deus_jax.models.products import matmul_precision

# Scores of so many queries and keys, of all heads, are in memory at once, in rows from a length on.
_BLOCKS = {2048: (256, 512), 512: (256, 128), 0: (128, 128)}
# Below every score; finite, so that a block without any visible key leaves no NaN behind.
_HIDDEN = -1e30


def tree_attention(
    query_BTNH: Float[Array, "b t n h"],
    key_BTKH: Float[Array, "b t k h"],
    value_BTKH: Float[Array, "b t k h"],
    ends_BT: Int[Array, "b t"],
    positions_BT: Int[Array, "b t"],
    scoring: Scoring = PLAIN,
) -> Float[Array, "b t n h"]:
    """Grouped-query attention of each token to its ancestors and itself.

    The tree is in depth-first order: token s is an ancestor of token t or t itself where
    s <= t < ends[s]. A row that is one sequence has all ends at its length. The softmax is computed
    block by block (Rabe and Staats 2021, arXiv 2112.05682); blocks after the queries are skipped,
    and so are those before the first that any of them sees, which all are to padding.

    Args:
        query_BTNH: Rotated queries, which are scaled in their dtype; head n belongs to KV head
            n // (n / k).
        key_BTKH: Rotated keys.
        value_BTKH: Values.
        ends_BT: Place after the last token that sees this one.
        positions_BT: Depth of each token in the tree.
        scoring: How scores are made, and how far back a token sees.

    Returns:
        The attended values, in the dtype of the queries.
    """
    batch, length, num_heads, head_dim = query_BTNH.shape
    num_kv_heads = key_BTKH.shape[2]
    queries, keys = next(sizes for shortest, sizes in _BLOCKS.items() if length >= shortest)
    scale = head_dim**-0.5 if scoring.scale is None else scoring.scale
    groups = num_heads // num_kv_heads
    padded = length + -length % max(queries, keys)

    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, padded - length)) + ((0, 0),) * (x.ndim - 2))

    query_BKGTH = jnp.transpose(
        pad(query_BTNH * scale).reshape(batch, padded, num_kv_heads, groups, head_dim),
        (0, 2, 3, 1, 4),
    )
    # As its products need it: a CPU would transpose every block of it for every chunk of queries.
    key_BKHS = pad(key_BTKH).transpose(0, 2, 3, 1)
    value_BKSH = pad(value_BTKH).transpose(0, 2, 1, 3)
    # A padded token sees itself.
    ends_BS = jnp.maximum(pad(ends_BT), jnp.arange(padded)[None] + 1)
    positions_BS = pad(positions_BT)

    starts_C = jnp.arange(0, padded, queries)
    first_C, until_C = _blocks_seen(ends_BS, starts_C, queries, keys)
    if scoring.window is not None:
        until_C = first_C

    def attend(chunk: tuple[Array, Array, Array]) -> Array:
        start, first, until = chunk
        query = jax.lax.dynamic_slice_in_dim(query_BKGTH, start, queries, axis=3)
        return _attend_chunk(
            *(query, start, first, until, key_BKHS, value_BKSH, ends_BS, positions_BS),
            keys=keys,
            scoring=scoring,
        )

    attended_CBKGQH = jax.lax.map(attend, (starts_C, first_C, until_C))
    attended_BCQKGH = attended_CBKGQH.transpose(1, 0, 4, 2, 3, 5)
    return attended_BCQKGH.reshape(batch, padded, num_heads, head_dim)[:, :length]


def _blocks_seen(ends_BS: Array, starts_C: Array, queries: int, keys: int) -> tuple[Array, Array]:
    """For each chunk of queries: the first block that any sees, and up to which all see all.

    Keys after a query are not thought of. All see all in a row of one text, else in what its
    sequences have in common.
    """
    ends_FBS = ends_BS.reshape(len(ends_BS), -1, keys).swapaxes(0, 1)
    first_C = jnp.argmax(jnp.max(ends_FBS, axis=(1, 2))[None] > starts_C[:, None], axis=1)
    is_partial_CF = jnp.min(ends_FBS, axis=(1, 2))[None] < starts_C[:, None] + queries
    blocks_1F = jnp.arange(len(ends_FBS))[None]
    is_next_CF = is_partial_CF & (blocks_1F >= first_C[:, None])
    return first_C, jnp.min(jnp.where(is_next_CF, blocks_1F, len(ends_FBS)), axis=1)


# The highest score so far, and the sums of exp(score - highest) and of that times the values.
_Softmax = tuple[Array, Array, Array]


def _add_weighted(state: _Softmax, scores_BKGQS: Array, value_BKSH: Array) -> _Softmax:
    """Takes more keys into a softmax whose maximum is not known yet."""
    highest_BKGQ, mass_BKGQ, summed_BKGQH = state
    higher_BKGQ = jnp.maximum(highest_BKGQ, jnp.max(scores_BKGQS, axis=-1))
    weights_BKGQS = jnp.exp(scores_BKGQS - higher_BKGQ[..., None])
    kept_BKGQ = jnp.exp(highest_BKGQ - higher_BKGQ)
    added_BKGQH = jnp.einsum(
        "bkgqs,bksh->bkgqh",
        weights_BKGQS.astype(value_BKSH.dtype),
        value_BKSH,
        precision=matmul_precision(value_BKSH.dtype),
        preferred_element_type=jnp.float32,
    )
    mass_BKGQ = mass_BKGQ * kept_BKGQ + jnp.sum(weights_BKGQS, axis=-1)
    return higher_BKGQ, mass_BKGQ, summed_BKGQH * kept_BKGQ[..., None] + added_BKGQH


def _attend_chunk(
    query_BKGQH: Array,
    start: Array,
    first_block: Array,
    seen_until: Array,
    key_BKHS: Array,
    value_BKSH: Array,
    ends_BS: Array,
    positions_BS: Array,
    *,
    keys: int,
    scoring: Scoring,
) -> Array:
    queries = query_BKGQH.shape[3]
    window = scoring.window
    position_BQ1 = jax.lax.dynamic_slice_in_dim(positions_BS, start, queries, axis=1)[..., None]
    precision = matmul_precision(query_BKGQH.dtype)
    place_1Q1 = (start + jnp.arange(queries))[None, :, None]

    def step(keys: int, seen_by_all: bool, block: Array, state: _Softmax) -> _Softmax:
        first = block * keys
        key = jax.lax.dynamic_slice_in_dim(key_BKHS, first, keys, axis=3)
        value = jax.lax.dynamic_slice_in_dim(value_BKSH, first, keys, axis=2)
        ends_B1S = jax.lax.dynamic_slice_in_dim(ends_BS, first, keys, axis=1)[:, None]
        place_11S = (first + jnp.arange(keys))[None, None]
        allowed_BQS = (place_11S <= place_1Q1) & (place_1Q1 < ends_B1S)
        if window is not None:
            position_BS = jax.lax.dynamic_slice_in_dim(positions_BS, first, keys, axis=1)
            allowed_BQS = allowed_BQS & (position_BQ1 - position_BS[:, None] < window)
        scores_BKGQS = jnp.einsum(
            "bkgqh,bkhs->bkgqs",
            query_BKGQH,
            key,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        scores_BKGQS = cap_softly(scores_BKGQS, scoring.soft_cap)
        if not seen_by_all:
            scores_BKGQS = jnp.where(allowed_BQS[:, None, None], scores_BKGQS, _HIDDEN)
        return _add_weighted(state, scores_BKGQS, value)

    zeros_BKGQ = jnp.zeros(query_BKGQH.shape[:4], jnp.float32)
    state = (zeros_BKGQ + _HIDDEN, zeros_BKGQ, jnp.zeros(query_BKGQH.shape, jnp.float32))
    # Whole blocks first, of which a CPU takes an eighth longer where something is to be hidden; of
    # the last ones, half of which none would see, only what is needed.
    whole, least = start // keys, min(queries, keys)
    done = jnp.minimum(seen_until, whole)
    state = jax.lax.fori_loop(first_block, done, functools.partial(step, keys, True), state)
    if keys > least:
        state = jax.lax.fori_loop(done, whole, functools.partial(step, keys, False), state)
        done = whole
    rest = (done * (keys // least), (start + queries) // least)
    state = jax.lax.fori_loop(*rest, functools.partial(step, least, False), state)
    _, mass_BKGQ, summed_BKGQH = state
    return (summed_BKGQH / mass_BKGQ[..., None]).astype(query_BKGQH.dtype)
