"""What an expansion will take, from the table of parameters alone."""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.config import UpscaleConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.memory import available_memory
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.params import block_size, block_specs, identity_values, outer_specs
from opt_deus_jax.transport.plan import is_wide
from opt_deus_jax.upscaling.grown_tensors import ExpansionPlan
from opt_deus_jax.upscaling.layout import LayerOrigin
from opt_deus_jax.upscaling.methods import Method

# Interpreter, JAX, compiled programs and pictures; a tiny model takes 0.6 GB.
_RUNTIME_BYTES = 800_000_000
# Tokens on which identity is proved.
_PROBE_TOKENS = 256
# Sinkhorn makes 40 to 640 on the matrices of SmolLM2-135M.
_ITERATIONS = 300
# Reading, hashing and writing.
_DISK_BYTES_PER_SECOND = 5e8
# Cubic in the rows, from SciPy's 6.6 s with 4096.
_ASSIGNMENT_SECONDS = 6.6 / 4096**3


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What an expansion takes.

    Attributes:
        memory_bytes: At its peak, the process as a whole.
        peak: What it does then.
        disk_bytes: What it writes.
        flops: Of all products, with those of the proof of identity.
        table_bytes: Read by Sinkhorn iterations, if each plan takes 300.
        assignment_seconds: Of exact assignments.
        moved_bytes: Read from and written to disk.
        proof_flops: Of `flops`, those of the proof of identity.
        gaps_at_once: Fused by each process at the same time.
        abreast: Gaps that all processes fuse at the same time.
    """

    memory_bytes: int
    peak: str
    disk_bytes: int
    flops: int
    table_bytes: int
    assignment_seconds: float
    moved_bytes: int
    proof_flops: int = 0
    gaps_at_once: int = 1
    abreast: int = 1


class Speed(NamedTuple):
    """What a device does in a second."""

    flops: float
    table_bytes: float


class _Matrix(NamedTuple):
    name: str
    count: int
    rows: int
    columns: int
    num_bytes: int


def _of_largest(config: ModelConfig) -> ModelConfig:
    """The network of one of its largest blocks: layers with experts and others differ."""
    sizes = [block_size(config, kind) for kind in config.layer_kinds]
    return config.of_layer(sizes.index(max(sizes)))


def _matrices(config: ModelConfig) -> Iterator[_Matrix]:
    """The kernels of a block; where experts are stacked, one of them stands for each."""
    for name, spec in block_specs(config).items():
        if len(spec.shape) > 1:
            *stacked, rows, columns = spec.shape
            yield _Matrix(name, math.prod(stacked), rows, columns, 4 * spec.size)


def _transported(config: ModelConfig, method: Method) -> list[_Matrix]:
    # As in fusion: the plan of down is not needed where down is zeroed.
    skipped = method.zero_init and "down_kernel" in identity_values(config)
    return [m for m in _matrices(config) if not (skipped and "down" in m.name)]


def _transport_bytes(matrix: _Matrix, transport: str) -> int:
    """Of one plan with its work space, and the kernels that it is made from and applied to."""
    table, kernel = 4 * matrix.rows**2, 4 * matrix.rows * matrix.columns
    if transport == "assignment":
        # Cost and kernels in float64 on the host; then the plan, as it is filled, and the map.
        return 5 * kernel + max(2 * table + 4 * kernel, 3 * table)
    if is_wide(matrix.rows, matrix.rows):
        return 5 * kernel + table + table // 8
    return 5 * kernel + 5 * table


def _symmetric_bytes(config: ModelConfig, upscale: UpscaleConfig, block: int) -> int:
    """Squared distances of all pairs of neurons in float64 and their signs; then the new block.

    Both beside a few kernels of the widest matrix. With entropy, tables of float32 follow.
    """
    rows = max(m.rows for m in _matrices(config))
    kernel = max(4 * m.rows * m.columns for m in _matrices(config))
    tables = 9 * rows**2 if upscale.epsilon is None else 28 * rows**2
    return max(block // 4 + 3 * kernel + tables, block + 6 * kernel)


def _fusion_peak(config: ModelConfig, upscale: UpscaleConfig, method: Method) -> tuple[int, str]:
    block = sum(4 * spec.size for spec in block_specs(config).values())
    if method.weights == "transport" and upscale.transport == "symmetric":
        return _symmetric_bytes(config, upscale, block), "matching of heads and neurons"
    if method.weights != "transport":
        return 3 * block, "a new layer beside its parents"
    done, peaks = 0, []
    for matrix in _transported(config, method):
        peaks.append((done + _transport_bytes(matrix, upscale.transport), matrix.name))
        kept_map = 0 if is_wide(matrix.rows, matrix.rows) else 4 * matrix.rows**2
        done += matrix.num_bytes + kept_map
    most, name = max(peaks)
    return max((most, f"transport of {name}"), (2 * block, "a new layer"))


def _proof_peak(config: ModelConfig, itemsize: int) -> int:
    block = sum(4 * spec.size for spec in block_specs(config).values())
    largest = max(spec.size for spec in block_specs(config).values())
    return block + (4 + 2 * itemsize) * largest + 4 * 4 * _PROBE_TOKENS * config.vocabulary_size


def _sizes(config: ModelConfig, layers: Sequence[LayerOrigin]) -> tuple[int, int, int]:
    """Parameters of all blocks of the base, of the grown model, and of those that are fused."""
    sizes = [block_size(config, kind) for kind in config.layer_kinds]
    grown, new = 0, 0
    for layer in layers:
        parents = (layer.base_layer, layer.previous, layer.next)
        size = sizes[next(parent for parent in parents if parent is not None)]
        grown += size
        new += size * (layer.base_layer is None)
    return sum(sizes), grown, new


def _memory_peak(
    config: ModelConfig, upscale: UpscaleConfig, method: Method, itemsize: int, gaps: int
) -> tuple[int, str]:
    """The most that a process takes which fuses so many gaps at once, and for what."""
    specs = (*outer_specs(config).values(), *block_specs(config).values())
    largest = max(spec.size for spec in specs)
    # A tensor, the pages of the file that it comes from, and where it is finite.
    peaks = [
        ((2 * itemsize + 1) * largest, "the largest tensor"),
        (_proof_peak(config, itemsize), "the proof of identity"),
    ]
    if gaps:
        fusion, doing = _fusion_peak(config, upscale, method)
        if gaps > 1:
            # Beside what is being made a tensor of another layer is written.
            fusion, doing = (
                gaps * fusion + itemsize * largest,
                f"{gaps} gaps at once, each: {doing}",
            )
        peaks.append((fusion, doing))
    return max(peaks)


def forecast(
    config: ModelConfig,
    upscale: UpscaleConfig,
    method: Method,
    layers: Sequence[LayerOrigin],
    itemsize: int,
    *,
    gaps_at_once: int = 1,
    processes: int = 1,
) -> Forecast:
    """Works out what an expansion takes.

    Args:
        config: The base.
        upscale: The `upscale` part of an experiment.
        method: It, resolved.
        layers: From `plan_layers`.
        itemsize: Bytes a parameter, as stored.
        gaps_at_once: How many gaps each process fuses at the same time.
        processes: How many share the work.

    Returns:
        The forecast, in memory that of one process.
    """
    base_size, grown_size, new_size = _sizes(config, layers)
    config = _of_largest(config)
    outer = {name: spec.size for name, spec in outer_specs(config).items()}
    fused = sum(layer.base_layer is None for layer in layers)
    gaps_at_once = max(1, min(gaps_at_once, fused))
    most, peak = _memory_peak(config, upscale, method, itemsize, gaps_at_once if fused else 0)
    plans = _transported(config, method) if method.weights == "transport" and fused else []
    if upscale.transport == "symmetric":
        plans = [m for m in plans if m.rows == config.mlp_width]
    soft = upscale.transport in ("reference", "barycentric") or upscale.epsilon is not None
    products = sum(4 * m.count * m.rows**2 * m.columns for m in plans)
    products += sum(
        2 * m.count * m.rows * m.columns**2 for m in plans if m.name[:2] in ("ga", "up")
    )
    base_bytes = itemsize * (base_size + sum(outer.values()))
    grown_bytes = itemsize * (grown_size + sum(outer.values()))
    multiplied = base_size + grown_size + 2 * max(outer.values())
    proof_flops = 2 * _PROBE_TOKENS * multiplied
    return Forecast(
        memory_bytes=_RUNTIME_BYTES + most,
        peak=peak,
        disk_bytes=grown_bytes,
        flops=fused * products + proof_flops,
        table_bytes=fused * soft * sum(_ITERATIONS * 2 * 4 * m.count * m.rows**2 for m in plans),
        assignment_seconds=fused
        * (not soft)
        * sum(_ASSIGNMENT_SECONDS * m.count * m.rows**3 for m in plans),
        moved_bytes=2 * base_bytes + 2 * grown_bytes + 2 * itemsize * new_size,
        proof_flops=proof_flops,
        gaps_at_once=gaps_at_once,
        abreast=max(1, min(gaps_at_once * processes, fused)),
    )


def forecast_plan(
    source: CheckpointSource, plan: ExpansionPlan, *, gaps_at_once: int, processes: int
) -> Forecast:
    """`forecast` of a base that is there."""
    itemsize = max(info.dtype.itemsize for info in source.tensors.values())
    return forecast(
        plan.config,
        plan.upscale,
        plan.method,
        plan.layers,
        itemsize,
        gaps_at_once=gaps_at_once,
        processes=processes,
    )


def stored_itemsize(hf_config: dict[str, Any]) -> int:
    """Bytes a parameter of a checkpoint of which only config.json is there."""
    name = hf_config.get("dtype", hf_config.get("torch_dtype")) or "float32"
    return jnp.dtype(name).itemsize


def measure_speed() -> Speed:
    """Times a product and passes over a table, in float32, for about a second."""
    size = 2048
    table = jnp.ones((size, size), jnp.float32)
    row = jnp.ones(size, jnp.float32)
    product = _seconds(table, table)
    return Speed(2 * size**3 / product, 4 * size**2 / _seconds(table, row))


@jax.jit
def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def _seconds(a: jax.Array, b: jax.Array) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        _product(a, b).block_until_ready()
        times.append(time.perf_counter() - start)
    return float(np.min(times[1:]))


def forecast_seconds(made: Forecast, speed: Speed) -> float:
    """How long an expansion takes on devices of some speed; half of that or twice is possible."""
    fusion = (made.flops - made.proof_flops) / speed.flops + made.table_bytes / speed.table_bytes
    fusion = (fusion + made.assignment_seconds) / made.abreast
    proof = made.proof_flops / speed.flops
    return fusion + proof + made.moved_bytes / _DISK_BYTES_PER_SECOND


def forecast_line(made: Forecast, max_shard_bytes: int) -> str:
    """One sentence about what an expansion takes at the speed that this machine is measured at.

    Shards are never larger than `max_shard_bytes`, so there may be more files than it says.
    """
    seconds = forecast_seconds(made, speed := measure_speed())
    files = math.ceil(made.disk_bytes / max_shard_bytes)
    shown = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return (
        f"expansion: about {made.memory_bytes / 2**30:.1f} GiB of memory ({made.peak}), "
        f"{made.disk_bytes / 2**30:.1f} GiB of disk in {files} or more files, {shown} here, at "
        f"{speed.flops / 1e9:.0f} GFLOP/s and {speed.table_bytes / 1e9:.0f} GB/s"
    )


def check_memory(made: Forecast, upscale: UpscaleConfig, processes_here: int = 1) -> None:
    """Refuses an expansion that this machine, or its control group, has no memory for.

    Args:
        made: The forecast.
        upscale: The `upscale` part of an experiment.
        processes_here: How many processes of the expansion run on this machine.

    Raises:
        UserError: It has not.
    """
    available = available_memory()
    needed = processes_here * made.memory_bytes
    if needed <= available:
        return
    remedy = "end other programs or use a machine with more"
    if made.gaps_at_once > 1:
        remedy += f", or set --gaps_at_once below {made.gaps_at_once}"
    if processes_here > 1:
        remedy += f", or start fewer than {processes_here} processes here"
    if upscale.method == "opt_deus" and upscale.transport in ("assignment", "symmetric"):
        remedy += f", or set upscale.transport=barycentric instead of {upscale.transport}"
    raise UserError(
        f"memory: this expansion needs about {needed / 2**30:.1f} GiB ({made.peak}) and "
        f"{available / 2**30:.1f} GiB are free; {remedy}"
    )
