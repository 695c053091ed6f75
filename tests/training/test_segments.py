import functools
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opt_deus_jax.errors import UserError
from opt_deus_jax.models.language_model import logits
from opt_deus_jax.models.layer_kinds import LayerKind
from opt_deus_jax.models.model_config import ModelConfig, read_model_config
from opt_deus_jax.models.params import block_specs, outer_specs
from opt_deus_jax.training.segments import (
    BlockNames,
    Segment,
    depth_of,
    invert_mask,
    merge,
    partition,
    plan_segments,
    select_trained,
    trained_mask,
)
from opt_deus_jax.training.weights import load_params
from opt_deus_jax.upscaling.layout import plan_layout
from tests.training.stacking import stack_blocks, unstack_blocks
from tests.training.tiny import tiny_hf_config, tiny_source

F, T, P = frozenset(), frozenset({"all", "some"}), frozenset({"some"})


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return read_model_config(tiny_hf_config(num_hidden_layers=6, tie_word_embeddings=False))


def flatten(segments: tuple[Segment, ...]) -> list[BlockNames]:
    by_depth = {
        depth_of(segment, repeat, place): names
        for segment in segments
        for repeat in range(segment.repeats)
        for place, names in enumerate(segment.pattern)
    }
    return [by_depth[depth] for depth in range(len(by_depth))]


LAYOUTS = {
    ("top", 32, 16): [((F,), 16), ((T, F), 16)],
    ("top", 30, 15): [((F,), 15), ((T, F), 15)],
    ("bottom", 32, 16): [((F,), 1), ((T, F), 16), ((F,), 15)],
    ("bottom", 30, 15): [((F,), 1), ((T, F), 15), ((F,), 14)],
    ("middle", 32, 16): [((F,), 8), ((T, F), 16), ((F,), 8)],
    ("middle", 30, 15): [((F,), 8), ((T, F), 15), ((F,), 7)],
    ("top_and_bottom", 32, 16): [((F,), 1), ((T, F), 8), ((F,), 15), ((T, F), 8)],
    ("top_and_bottom", 30, 15): [((F,), 1), ((T, F), 7), ((F,), 14), ((T, F), 8)],
    ("uniform", 32, 16): [((F,), 2), ((T, F, F), 15), ((T,), 1)],
    ("uniform", 30, 15): [((F,), 2), ((T, F, F), 14), ((T,), 1)],
    ("stack", 32, 16): [((F,), 24), ((T,), 16), ((F,), 8)],
    ("stack", 30, 15): [((F,), 23), ((T,), 15), ((F,), 7)],
}


@pytest.mark.parametrize(("layout", "depth", "num_new"), LAYOUTS)
def test_layouts_become_the_shortest_patterns(layout: str, depth: int, num_new: int):
    blocks = [T if origin.is_new else F for origin in plan_layout(layout, depth, num_new)]
    segments = plan_segments(blocks)
    assert [(s.pattern, s.repeats) for s in segments] == LAYOUTS[layout, depth, num_new]
    assert flatten(segments) == blocks


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ([T] * 48, [((T,), 48)]),
        ([F] * 4, [((F,), 4)]),
        ([F, F, F, T, F], [((F,), 3), ((T,), 1), ((F,), 1)]),
        # Explicit gaps 1, 4, 7 of 9 layers.
        (
            [F, F, T, F, F, F, T, F, F, F, T, F],
            [((F,), 2), ((T, F, F, F), 2), ((T,), 1), ((F,), 1)],
        ),
        # Blocks that differ in what is trained are different blocks.
        ([T, P, T, P], [((T, P), 2)]),
        ([P, P, T, T, F, F], [((P,), 2), ((T,), 2), ((F,), 2)]),
        # After the lowest trained block frozen ones may share its pattern, not before.
        ([F, T, F, T], [((F,), 1), ((T,), 1), ((F,), 1), ((T,), 1)]),
        ([F, T, F, T, F], [((F,), 1), ((T, F), 2)]),
    ],
)
def test_other_depths_become_the_shortest_patterns(
    blocks: list[BlockNames], expected: list[tuple[tuple[BlockNames, ...], int]]
):
    assert [(s.pattern, s.repeats) for s in plan_segments(blocks)] == expected


@pytest.mark.parametrize("seed", range(30))
def test_random_depths_are_covered_in_order(seed: int):
    draw = random.Random(seed)
    blocks = draw.choices((F, P, T), (draw.choice((1, 4)), 1, 1), k=draw.randint(1, 40))
    segments = plan_segments(blocks)
    assert flatten(segments) == blocks
    runs = 1 + sum(left != right for left, right in zip(blocks, blocks[1:], strict=False))
    assert sum(len(segment.pattern) for segment in segments) <= runs
    assert all(segment.repeats > 1 or len(segment.pattern) == 1 for segment in segments)
    lowest = next((depth for depth, names in enumerate(blocks) if names), len(blocks))
    assert all(not any(segment.pattern) for segment in segments if segment.first_depth < lowest)


L, G = LayerKind(window=4, rope=1), LayerKind()


def test_layers_of_several_kinds_are_stacked_by_kind():
    # Gemma 3's five layers with a window to one without.
    kinds = ([L] * 5 + [G]) * 4 + [L] * 2
    planned = [(s.pattern, s.repeats) for s in plan_segments([T] * 26, kinds)]
    assert planned == [((T,) * 6, 4), ((T,), 2)]
    # A frozen prefix of its own, then a new layer of the kind of the one above it.
    kinds = [L, G, L, G, L, L, G, G, L, L]
    planned = plan_segments([F, F, F, F, T, F, T, F, T, F], kinds)
    assert [(s.pattern, s.repeats, s.first_depth) for s in planned] == [
        ((F, F), 2, 0),
        *(((T,), 1, depth) if depth % 2 == 0 else ((F,), 1, depth) for depth in range(4, 10)),
    ]
    for segment in planned:
        for place in range(len(segment.pattern)):
            depths = [depth_of(segment, repeat, place) for repeat in range(segment.repeats)]
            assert len({kinds[depth] for depth in depths}) == 1
    assert plan_segments([F] * 4, [G] * 4) == plan_segments([F] * 4)


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match="at least one block"):
        plan_segments([])
    with pytest.raises(ValueError, match="shorter"):
        plan_segments([F] * 3, [L, G])


def test_new_and_all_select_whole_blocks(config: ModelConfig):
    everything, is_new = frozenset(block_specs(config)), [False, True, True]
    names = select_trained(config, is_new, "new")
    assert (names.outer, names.blocks) == (frozenset(), (frozenset(), everything, everything))
    names = select_trained(config, is_new, "all")
    assert (names.outer, names.blocks) == (frozenset(outer_specs(config)), (everything,) * 3)


MLP = frozenset({"gate_kernel", "up_kernel", "down_kernel"})
HEAD = frozenset({"head"})


@pytest.mark.parametrize(
    ("expression", "outer", "blocks"),
    [
        (r"\.mlp\.", F, [MLP] * 12),
        (r"layers\.1\..*q_proj", F, [F, {"query_kernel"}, *[F] * 10]),
        (r"layers\.1\d\..*q_proj", F, [*[F] * 10, {"query_kernel"}, {"query_kernel"}]),
        (r"lm_head|layers\.11\.mlp", HEAD, [*[F] * 11, MLP]),
        (r"^model\.norm", {"final_norm"}, [F] * 12),
        (r"embed_tokens", {"embedding"}, [F] * 12),
        (r"norm", {"final_norm"}, [{"input_norm", "post_attention_norm"}] * 12),
    ],
)
def test_an_expression_is_searched_in_hugging_face_names(
    config: ModelConfig, expression: str, outer: set[str], blocks: list[set[str]]
):
    names = select_trained(config, [False] * 11 + [True], expression)
    assert names.outer == outer
    assert list(names.blocks) == blocks


def test_a_tied_head_is_the_embedding():
    tied = read_model_config(tiny_hf_config(tie_word_embeddings=True))
    assert select_trained(tied, [True], "all").outer == {"embedding", "final_norm"}
    assert select_trained(tied, [True], "embed_tokens").outer == {"embedding"}
    with pytest.raises(UserError, match="upscale.trained='lm_head': found in no tensor's name"):
        select_trained(tied, [True], "lm_head")


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        ("new", "upscale.trained='new': the model has no new layer to train"),
        ("q_proj(", "upscale.trained='q_proj\\(': neither new nor all nor a regular expression"),
        ("layers.9.", "upscale.trained='layers.9.': found in no tensor's name"),
    ],
)
def test_a_selection_of_nothing_is_refused(config: ModelConfig, trained: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        select_trained(config, [False] * 6, trained)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "is_new",
    [[False, False, True, False, True, False], [False, True, True, False, False, True]],
)
def test_segmented_forward_equals_unsegmented(config: ModelConfig, is_new: list[bool]):
    source = tiny_source(num_hidden_layers=6, tie_word_embeddings=False)
    load = functools.partial(
        load_params,
        source,
        config,
        dtype=jnp.dtype("float32"),
        shardings=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    )
    segments = plan_segments(select_trained(config, is_new, "new").blocks)
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


def params_and_mask(config: ModelConfig, is_new: list[bool], trained: str) -> tuple[dict, dict]:
    names = select_trained(config, is_new, trained)
    segments = plan_segments(names.blocks)
    blocks = [dict.fromkeys(block_specs(config), jnp.ones(2)) for _ in is_new]
    params: dict[str, Any] = {name: jnp.ones(3) for name in outer_specs(config)}
    params["segments"] = stack_blocks(blocks, segments)
    return params, trained_mask(config, segments, names.outer)


@pytest.mark.parametrize(
    ("trained", "count"), [("new", 9), ("all", 9 + 3), ("lm_head|[24].mlp", 1 + 3)]
)
def test_partition_and_merge_are_each_others_inverse(config: ModelConfig, trained: str, count: int):
    params, mask = params_and_mask(config, [False, False, True, False], trained)
    trainable, frozen = partition(params, mask)
    assert len(jax.tree.leaves(trainable)) == count
    assert (trainable["embedding"] is None) == (trained != "all")
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
    params, mask = params_and_mask(config, [True, True], "all")
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


def test_names_that_are_not_the_networks_are_refused(config: ModelConfig):
    with pytest.raises(ValueError, match="'some'"):
        trained_mask(config, plan_segments([P]), frozenset())
    with pytest.raises(ValueError, match="'tail'"):
        trained_mask(config, plan_segments([F]), frozenset({"tail"}))
