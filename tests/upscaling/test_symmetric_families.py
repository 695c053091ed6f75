"""Alignment by symmetries, for every architecture and every kind of its layers."""

import dataclasses

import numpy as np
import pytest

from opt_deus_jax.config import UpscaleConfig
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import block_specs
from opt_deus_jax.upscaling.blending import unit_cosines
from opt_deus_jax.upscaling.expand import expand_checkpoint
from opt_deus_jax.upscaling.experts import expert_block, stack_expert_blocks
from opt_deus_jax.upscaling.features import (
    HEAD_MATRICES,
    NEURON_MATRICES,
    fold_features,
    shift_norms,
)
from opt_deus_jax.upscaling.symmetric import align_block, fuse_symmetric
from tests.families import VARIANTS, base, load, oracle, write
from tests.llama_checkpoints import oracle_logits, tokens
from tests.upscaling.symmetry_copies import run_block


def blocks_of(variant):
    """The blocks of the highest layers that have the same parameters, three at least."""
    source = base(variant)
    config = read_model_config(source.hf_config)
    layers = [
        layer
        for layer, kind in enumerate(config.layer_kinds)
        if kind.has_experts == config.layer_kinds[-1].has_experts
    ]
    config = dataclasses.replace(config, layer_kinds=tuple(config.layer_kinds[i] for i in layers))
    return config, [
        {
            name: source.read(spec.hf_name.format(layer=layer)).astype(np.float32)
            for name, spec in block_specs(config).items()
        }
        for layer in layers
    ]


def head_features(block, config):
    return fold_features(shift_norms(block, config.norm.offset), HEAD_MATRICES)


def neuron_features(block, config):
    """Of a block's MLP, or of all its experts one after another."""
    block = shift_norms(block, config.norm.offset)
    if "router_kernel" not in block:
        return fold_features(block, NEURON_MATRICES)
    each = [
        fold_features(expert_block(block, expert), NEURON_MATRICES)
        for expert in range(config.experts.number)
    ]
    return {name: np.concatenate([of_one[name] for of_one in each]) for name in NEURON_MATRICES}


def assert_same_function(config, block, expected, tolerance=1e-5):
    for kind in set(config.layer_kinds):
        output, wanted = (run_block(config, made, kind) for made in (block, expected))
        assert np.linalg.norm(output - wanted) < tolerance * np.linalg.norm(wanted), kind


def shuffled(block, config, seed):
    """The same function with heads and neurons in other places; half turns and flips of signs."""
    generator = np.random.default_rng(seed)
    block = dict(block)
    groups, size = config.num_kv_heads, config.head_dim
    heads = config.num_heads // groups
    group_order = generator.permutation(groups)
    head_order = np.concatenate([heads * g + generator.permutation(heads) for g in group_order])
    rows = {
        "query": (head_order[:, None] * size + np.arange(size)).ravel(),
        "key": (group_order[:, None] * size + np.arange(size)).ravel(),
    }
    # A whole head turned by half: every plane of its queries and of its key.
    turns = generator.choice([-1.0, 1.0], groups).astype(np.float32)
    signs = {
        "query": np.repeat(np.repeat(turns, heads), size),
        "key": np.repeat(turns, size),
        "value": np.ones(groups * size, np.float32),
    }
    rows["value"], rows["output"] = rows["key"], rows["query"]
    for name, sign in signs.items():
        block[f"{name}_kernel"] = sign[:, None] * block[f"{name}_kernel"][rows[name]]
        if f"{name}_bias" in block:
            block[f"{name}_bias"] = sign * block[f"{name}_bias"][rows[name]]
        if len(block.get(f"{name}_norm", ())) == len(sign):
            block[f"{name}_norm"] = block[f"{name}_norm"][rows[name]]
    block["output_kernel"] = block["output_kernel"][:, rows["output"]]
    if "router_kernel" not in block:
        return shuffled_neurons(block, generator)
    order = generator.permutation(config.experts.number)
    experts = [shuffled_neurons(expert_block(block, expert), generator) for expert in order]
    return block | stack_expert_blocks(experts) | {"router_kernel": block["router_kernel"][order]}


def shuffled_neurons(block, generator):
    """The same MLP with its neurons in other places, up and down with other signs."""
    block, width = dict(block), len(block["gate_kernel"])
    neurons = generator.permutation(width)
    flips = generator.choice([-1.0, 1.0], width).astype(np.float32)
    for name, sign in {"gate": np.ones_like(flips), "up": flips}.items():
        block[f"{name}_kernel"] = sign[:, None] * block[f"{name}_kernel"][neurons]
        if f"{name}_bias" in block:
            block[f"{name}_bias"] = sign * block[f"{name}_bias"][neurons]
    block["down_kernel"] = block["down_kernel"][:, neurons] * flips
    return block


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_aligned_block_computes_what_it_computed(variant):
    config, blocks = blocks_of(variant)
    a, b = blocks[1:3]
    aligned = align_block(a, b, config)
    assert aligned.keys() == b.keys()
    assert_same_function(config, aligned, a)
    for fold in (head_features, neuron_features):
        before, after, target = (fold(block, config) for block in (a, aligned, b))
        assert unit_cosines(after, target, 1) > unit_cosines(before, target, 1) + 0.05


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_shuffled_copy_is_found_again(variant):
    config, blocks = blocks_of(variant)
    a = blocks[1]
    copy = shuffled(a, config, 3)
    assert_same_function(config, copy, a)
    assert np.abs(copy["query_kernel"] - a["query_kernel"]).max() > 0.1
    aligned = align_block(a, copy, config)
    for name, array in copy.items():
        assert np.linalg.norm(aligned[name] - array) <= 1e-4 * np.linalg.norm(array), name
    for fusion in ("mean", "select"):
        fused = fuse_symmetric(a, copy, config=config, fusion=fusion)
        assert_same_function(config, fused.block, a, 1e-4)


@pytest.mark.parametrize("variant", ["qwen3", "olmo2", "gemma3_text", "phi3", "mixtral"])
def test_a_base_grows_by_symmetric_fusion(tmp_path, variant):
    made = expand_checkpoint(
        write(variant, tmp_path / "base"),
        UpscaleConfig(transport="symmetric", fusion="matched", num_new_layers=2),
        tmp_path / "grown",
        probe_BT=tokens(length=12, vocabulary=64),
        max_shard_bytes=10**9,
    )
    assert made.identity.bit_identical
    tokens_BT = tokens(length=40, vocabulary=64)
    expected = oracle_logits(oracle(variant), tokens_BT)
    logits = oracle_logits(load(tmp_path / "grown"), tokens_BT)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
