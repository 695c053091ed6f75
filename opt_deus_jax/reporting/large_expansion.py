"""An expansion of a made-up checkpoint: killed, gone on with, checked and timed."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from opt_deus_jax.checkpoints.hf import write_weights
from opt_deus_jax.checkpoints.journal import count_written
from opt_deus_jax.checkpoints.manifest import read_manifest
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.checkpoints.source import CheckpointSource, TensorInfo
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import block_specs, identity_values, named_tensors
from opt_deus_jax.reporting.measured_process import Measured, run_measured
from opt_deus_jax.upscaling.alignment import align
from opt_deus_jax.upscaling.base_tensors import parent_block
from opt_deus_jax.upscaling.features import (
    HEAD_MATRICES,
    NEURON_MATRICES,
    fold_features,
    shift_norms,
)
from opt_deus_jax.upscaling.forecast import Speed
from opt_deus_jax.upscaling.fusion import transport_epsilon
from opt_deus_jax.upscaling.heads import match_heads
from opt_deus_jax.upscaling.neurons import match_neurons
from opt_deus_jax.whole_files import write_json

# Of the size that weights of Llama have.
_SIGMA = 0.02
_MATRICES = ("query", "key", "value", "output", "gate", "up")


def write_random_checkpoint(
    directory: Path, hf_config: Mapping[str, Any], num_layers: int, max_shard_bytes: int
) -> None:
    """Writes a Hugging Face folder of random bfloat16 weights.

    Args:
        directory: The folder to make.
        hf_config: A config.json of the shape wanted.
        num_layers: The depth wanted.
        max_shard_bytes: Size above which safetensors are split.
    """
    directory.mkdir(parents=True)
    hf_config = {**hf_config, "num_hidden_layers": num_layers}
    specs = dict(named_tensors(read_model_config(hf_config), num_layers))
    generator = np.random.default_rng(0)
    dtype = np.dtype(ml_dtypes.bfloat16)

    def draw(name: str) -> np.ndarray:
        centre = np.float32(specs[name].init == "ones")
        drawn = generator.standard_normal(specs[name].shape, dtype=np.float32)
        drawn *= np.float32(_SIGMA)
        drawn += centre
        return drawn.astype(dtype)

    tensors = [(name, TensorInfo(spec.shape, dtype)) for name, spec in specs.items()]
    write_weights(directory, tensors, draw, max_shard_bytes)
    write_json(directory / "config.json", hf_config)


def expand_with_kills(
    command: Sequence[str], expanded: Path, num_tensors: int, kills: int
) -> list[Measured]:
    """Expands, and kills the process at even shares of its tensors.

    Args:
        command: Starts the expansion, and goes on with it.
        expanded: The folder that it makes.
        num_tensors: How many tensors it writes.
        kills: How often it is killed.

    Returns:
        What each process took.

    Raises:
        UserError: One of them failed.
    """
    partial = expanded.with_name(expanded.name + ".partial")
    taken: list[Measured] = []
    for kill in range(1, kills + 1):

        def is_time(lines: int = num_tensors * kill // (kills + 1)) -> bool:
            return count_written(partial) >= lines

        taken.append(run_measured(command, is_time))
    return [*taken, run_measured(command)]


def check_grown(base: Path, expanded: Path) -> dict[str, Any]:
    """Holds every tensor of a grown model against its base.

    Args:
        base: The base.
        expanded: The grown model, of a method that starts as the identity.

    Returns:
        How many tensors are copies, how many are zero and how many were fused.

    Raises:
        UserError: A copy is not one, a tensor that should be zero is not, or one that should not is
            or is not finite; or the identity was not exact.
    """
    source, grown = open_checkpoint(str(base)), open_checkpoint(str(expanded))
    manifest, config = read_manifest(expanded), read_model_config(source.hf_config)
    ends = identity_values(config)
    counts = {"copied": 0, "ends": 0, "fused": 0}
    for layer in manifest.layers:
        for key, spec in block_specs(config).items():
            name = spec.hf_name.format(layer=layer["depth"])
            array = grown.read(name)
            if layer["base_layer"] is not None:
                kind = "copied"
                like = source.read(spec.hf_name.format(layer=layer["base_layer"]))
                is_right = np.array_equal(array.view(np.uint8), like.view(np.uint8))
            elif key in ends:
                kind, is_right = "ends", not np.any(array != np.asarray(ends[key], array.dtype))
            else:
                kind, is_right = "fused", bool(np.isfinite(array).all() and array.any())
            if not is_right:
                raise UserError(f"{expanded}: tensor {name} is not what it should be ({kind})")
            counts[kind] += 1
    if not manifest.identity["bit_identical"]:
        raise UserError(f"{expanded}: the grown model is not its base")
    return counts


def time_matrices(
    source: CheckpointSource, gap: int, speed: Speed, transport: str, epsilon: float | None
) -> Iterator[dict[str, Any]]:
    """Aligns what a gap has: matrices one by one, or for `symmetric` heads and neurons as wholes.

    What compiles something is done twice, and the second time counts.

    Args:
        source: The base.
        gap: Between which layers.
        speed: Of this machine.
        transport: `upscale.transport`.
        epsilon: `upscale.epsilon`.

    Yields:
        By matrix: seconds, and the least that its two products and the passes of its iterations
        over one table would take; of heads and neurons, their inner products.
    """
    if transport == "symmetric":
        yield from _time_matches(source, gap, speed, epsilon)
        return
    specs = block_specs(read_model_config(source.hf_config))
    seen: set[tuple[int, ...]] = set()
    for name in _MATRICES:
        hf_name = specs[f"{name}_kernel"].hf_name
        a, b = (
            jax.numpy.asarray(source.read(hf_name.format(layer=gap + i)).astype(np.float32))
            for i in (0, 1)
        )
        for _ in range(1 if a.shape in seen else 2):
            start = time.perf_counter()
            made = align(a, b, transport=transport, epsilon=transport_epsilon(transport, epsilon))
            made.fused_ND.block_until_ready()
            seconds = time.perf_counter() - start
            iterations = int(made.coupling.iterations)
            del made
        seen.add(a.shape)
        rows, columns = a.shape
        yield _timed(name, a.shape, seconds, speed, 4 * rows**2 * columns, iterations)


def _time_matches(
    source: CheckpointSource, gap: int, speed: Speed, epsilon: float | None
) -> Iterator[dict[str, Any]]:
    config = read_model_config(source.hf_config)
    a, b = (
        shift_norms(parent_block(source.read, config, gap + i), config.norm.offset) for i in (0, 1)
    )
    start = time.perf_counter()
    match_heads(fold_features(a, HEAD_MATRICES), fold_features(b, HEAD_MATRICES), config)
    seconds = time.perf_counter() - start
    heads, groups, size = config.num_heads, config.num_kv_heads, config.head_dim
    # Of queries and keys planes are held against their like, of values and outputs all rows.
    flops = config.width * (4 * size + 2 * size**2) * (heads**2 + groups**2)
    yield _timed("heads", (heads * size, config.width), seconds, speed, flops, 0)
    start = time.perf_counter()
    features = fold_features(a, NEURON_MATRICES), fold_features(b, NEURON_MATRICES)
    match = match_neurons(*features, epsilon)
    seconds = time.perf_counter() - start
    shape = (config.mlp_width, config.width)
    iterations = int(match.coupling.iterations) if match.coupling else 0
    yield _timed("neurons", shape, seconds, speed, 3 * 2 * shape[0] ** 2 * shape[1], iterations)


def _timed(
    name: str, shape: tuple[int, ...], seconds: float, speed: Speed, flops: int, iterations: int
) -> dict[str, Any]:
    rows, columns = shape
    products = flops / speed.flops
    passes = iterations * 2 * 4 * rows**2 / speed.table_bytes
    floor = products + passes
    return {
        **{"matrix": name, "rows": rows, "columns": columns, "seconds": seconds},
        **{"floor_s": floor, "products_s": products, "passes_s": passes},
        **{"iterations": iterations, "over_floor": seconds / floor},
    }
