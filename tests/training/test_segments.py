import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opt_deus_jax.errors import UserError
from opt_deus_jax.models.language_model import logits
from opt_deus_jax.models.model_config import ModelConfig, read_model_config
from opt_deus_jax.models.params import block_specs
from opt_deus_jax.training.segments import (
    Segment,
    depth_of,
    invert_mask,
    merge,
    partition,
    plan_segments,
    stack_blocks,
    trained_mask,
    unstack_blocks,
)
from opt_deus_jax.training.weights import load_params
from tests.training.tiny import tiny_hf_config, tiny_source

F, T = False, True


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return read_model_config(tiny_hf_config(num_hidden_layers=6, tie_word_embeddings=False))


def flatten(segments: tuple[Segment, ...]) -> list[bool]:
    by_depth = {
        depth_of(segment, repeat, place): is_trained
        for segment in segments
        for repeat in range(segment.repeats)
        for place, is_trained in enumerate(segment.pattern)
    }
    return [by_depth[depth] for depth in range(len(by_depth))]


LAYOUTS = {
    "top": ([F] * 16 + [T, F] * 16, [((F,), 16), ((T, F), 16)]),
    "bottom": ([F, T] * 16 + [F] * 16, [((F, T), 16), ((F,), 16)]),
    "middle": (
        [F] * 9 + [T, F] * 16 + [F] * 7,
        [((F,), 9), ((T, F), 16), ((F,), 7)],
    ),
    "top_and_bottom": (
        [F, T] * 8 + [F] * 16 + [T, F] * 8,
        [((F, T), 8), ((F,), 16), ((T, F), 8)],
    ),
    "uniform": ([F, F, T] * 16, [((F, F, T), 16)]),
    "all": ([T] * 48, [((T,), 48)]),
    "one new": ([F, F, F, T, F], [((F,), 3), ((T,), 1), ((F,), 1)]),
    "one layer": ([T], [((T,), 1)]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_become_the_shortest_patterns(name: str):
    mask, expected = LAYOUTS[name]
    segments = plan_segments(mask)
    assert [(segment.pattern, segment.repeats) for segment in segments] == expected
    assert flatten(segments) == mask


@pytest.mark.parametrize("seed", range(30))
def test_random_masks_are_covered_in_order(seed: int):
    draw = random.Random(seed)
    mask = [draw.random() < draw.choice((0.2, 0.5, 0.9)) for _ in range(draw.randint(1, 40))]
    segments = plan_segments(mask)
    assert flatten(segments) == mask
    runs = 1 + sum(left != right for left, right in zip(mask, mask[1:], strict=False))
    assert sum(len(segment.pattern) for segment in segments) <= runs
    # Nothing frozen before the first trained block shares an unrepeated pattern with it.
    assert all(segment.repeats > 1 or len(segment.pattern) == 1 for segment in segments)


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match="at least one block"):
        plan_segments([])


@pytest.mark.parametrize("mask", [[F, F, T, F, T, F], [F, T, T, F, F, T]])
def test_segmented_forward_equals_unsegmented(config: ModelConfig, mask: list[bool]):
    source = tiny_source(num_hidden_layers=6, tie_word_embeddings=False)
    load = functools.partial(
        load_params,
        source,
        config,
        dtype=jnp.dtype("float32"),
        sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    )
    segments = plan_segments(mask)
    params, segmented = load(plan_segments([F] * 6)), load(segments)
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 64)
    forward = jax.jit(functools.partial(logits, config=config, dtype=jnp.dtype("float32")))
    expected, actual = forward(params, tokens), forward(segmented, tokens)
    np.testing.assert_allclose(actual, expected, atol=5e-5)
    blocks = unstack_blocks(params["segments"], plan_segments([F] * 6))
    jax.tree.map(
        np.testing.assert_array_equal, unstack_blocks(segmented["segments"], segments), blocks
    )
    jax.tree.map(
        np.testing.assert_array_equal, stack_blocks(blocks, segments), segmented["segments"]
    )


def segmented_params(config: ModelConfig, mask: list[bool]) -> dict:
    blocks = [dict.fromkeys(block_specs(config), jnp.ones(2)) for _ in mask]
    outer = {name: jnp.ones(3) for name in ("embedding", "final_norm", "head")}
    return outer | {"segments": stack_blocks(blocks, plan_segments(mask))}


def test_partition_and_merge_are_each_others_inverse(config: ModelConfig):
    mask_by_depth = [F, F, T, F]
    params = segmented_params(config, mask_by_depth)
    mask = trained_mask(config, plan_segments(mask_by_depth), "new")
    trainable, frozen = partition(params, mask)
    assert len(jax.tree.leaves(trainable)) == 9
    assert trainable["embedding"] is None
    assert len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen)) == len(
        jax.tree.leaves(params)
    )
    merged = merge(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(
        a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True)
    )
    swapped = partition(params, invert_mask(mask))
    assert jax.tree.structure(swapped[0]) == jax.tree.structure(frozen)


def test_every_leaf_is_trained_or_frozen_exactly_once(config: ModelConfig):
    params = segmented_params(config, [T, T])
    mask = trained_mask(config, plan_segments([T, T]), "all")
    assert all(jax.tree.leaves(mask))
    with pytest.raises(ValueError, match="differ in structure"):
        partition(params | {"unknown": jnp.ones(2)}, mask)
    trainable, frozen = partition(params, mask)
    with pytest.raises(ValueError, match=r"\['head'\] is in both"):
        merge(trainable, frozen | {"head": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"\['embedding'\] is in neither"):
        merge(trainable | {"embedding": None}, frozen)
    with pytest.raises(ValueError, match="unknown"):
        merge(trainable | {"unknown": jnp.ones(3)}, frozen)


def test_masks_that_cannot_be_meant_are_refused(config: ModelConfig):
    with pytest.raises(UserError, match="no new layer to train"):
        trained_mask(config, plan_segments([F, F]), "new")
    with pytest.raises(ValueError, match="leaves a block out"):
        trained_mask(config, plan_segments([F, T]), "all")
    with pytest.raises(ValueError, match="use new or all"):
        trained_mask(config, plan_segments([T]), "published")
