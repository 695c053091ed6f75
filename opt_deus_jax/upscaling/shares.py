"""Which process writes which files of a grown model."""

from collections.abc import Callable, Sequence

from opt_deus_jax.checkpoints.hf import Shard

# Halvings of the largest share's work; gaps are counted in whole numbers, bytes break ties.
_HALVINGS = 40


def share_out(
    shards: Sequence[Shard], fused_depth: Callable[[str], int | None], count: int
) -> list[list[Shard]]:
    """Divides files into contiguous runs, of which the one with most work has as little as can be.

    The work of a run is the number of layers that are fused for it, one that straddles two runs
    counted in both, and its part of all bytes: to copy the whole model is taken for as much as to
    fuse one gap.

    Args:
        shards: All files, in order.
        fused_depth: Of a tensor's name the depth of the fused layer that it is of, or None.
        count: How many processes there are.

    Returns:
        A run for each process; the last ones may be empty.
    """
    depths = [{fused_depth(name) for name, _ in shard.tensors} - {None} for shard in shards]
    sizes = [sum(info.num_bytes for _, info in shard.tensors) for shard in shards]
    total = sum(sizes)

    def runs_below(bound: float) -> list[list[Shard]]:
        runs: list[list[Shard]] = []
        fused, size = set(), 0
        for shard, more_depths, more_bytes in zip(shards, depths, sizes, strict=True):
            fused, size = fused | more_depths, size + more_bytes
            if not runs or len(fused) + size / total > bound:
                runs.append([])
                fused, size = more_depths, more_bytes
            runs[-1].append(shard)
        return runs

    # Each run alone has at most this much, so one run is enough for all.
    low, high = 0.0, float(len(set().union(*depths)) + 1)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if len(runs_below(middle)) <= count else (middle, high)
    runs = runs_below(high)
    return runs + [[] for _ in range(count - len(runs))]
