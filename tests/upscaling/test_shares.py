"""Which process writes which files."""

import itertools
import math

import numpy as np
import pytest

from opt_deus_jax.checkpoints.hf import Shard
from opt_deus_jax.checkpoints.source import TensorInfo
from opt_deus_jax.upscaling.shares import share_out


def shards_of(*files):
    """Files of (depth of the fused layer or None, bytes) for each tensor; names hold the depth."""
    numbers = itertools.count()
    return [
        Shard(str(i), b"", tuple(
            (f"{depth} {next(numbers)}", TensorInfo((size,), np.dtype(np.int8)))
            for depth, size in tensors
        ))
        for i, tensors in enumerate(files)
    ]  # fmt: skip


def fused_depth(name):
    depth = name.split()[0]
    return None if depth == "None" else int(depth)


def work_of(run, total):
    tensors = [tensor for shard in run for tensor in shard.tensors]
    depths = {fused_depth(name) for name, _ in tensors} - {None}
    return len(depths) + sum(info.num_bytes for _, info in tensors) / total


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_runs_are_contiguous_and_the_largest_is_as_small_as_can_be(seed, count):
    draw = np.random.default_rng(seed)
    depths = sorted(draw.integers(0, 8, 21).tolist())
    tensors = [(depth if depth > 3 else None, int(draw.integers(1, 50))) for depth in depths]
    shards = shards_of(*(tensors[i : i + 3] for i in range(0, 21, 3)))
    runs = share_out(shards, fused_depth, count)
    assert len(runs) == count
    assert [shard for run in runs for shard in run] == shards
    total = sum(size for _, size in tensors)
    # Every way of cutting seven files into at most so many runs.
    best = math.inf
    for cuts in itertools.combinations_with_replacement(range(8), count - 1):
        edges = [0, *cuts, 7]
        best = min(best, max(work_of(shards[a:b], total) for a, b in itertools.pairwise(edges)))
    assert max(work_of(run, total) for run in runs) == pytest.approx(best)


def test_gaps_count_before_bytes():
    # Half of the model is copied; all gaps are in the last two files.
    shards = shards_of([(None, 90)], [(None, 90)], [(4, 5), (6, 5)], [(8, 5), (10, 5)])
    assert [len(run) for run in share_out(shards, fused_depth, 2)] == [3, 1]


def test_a_model_without_new_layers_is_divided_by_its_bytes():
    shards = shards_of([(None, 10)], [(None, 10)], [(None, 10)], [(None, 30)])
    assert [len(run) for run in share_out(shards, fused_depth, 2)] == [3, 1]
