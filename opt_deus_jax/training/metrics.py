"""Metrics as JSON lines, for TensorBoard and on the screen."""

import contextlib
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from opt_deus_jax.distributed.device_facts import peak_flops
from opt_deus_jax.errors import DivergedError
from opt_deus_jax.models.language_model import Params
from opt_deus_jax.whole_files import write_text

WriteMetrics = Callable[[int, Mapping[str, float]], None]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Reads a file of metrics.

    Args:
        path: A `metrics.jsonl`; it need not exist.

    Returns:
        Its whole lines; a process that was killed may have left half a line at the end.
    """
    lines = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for line in path.read_text(encoding="utf-8").splitlines():
            lines.append(json.loads(line))
    return lines


def _drop_later(path: Path, last_step: int) -> None:
    kept = [line for line in read_metrics(path) if line["step"] <= last_step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


@contextlib.contextmanager
def open_metrics(workdir: Path, last_step: int, *, is_writer: bool) -> Iterator[WriteMetrics]:
    """Opens `metrics.jsonl` and `tensorboard/` of a work directory for appending.

    Args:
        workdir: The work directory.
        last_step: What was written about later steps is dropped: they are about to be repeated.
            -1 drops everything.
        is_writer: Whether this process writes; one of all processes does.

    Yields:
        A function that writes named values of a step, or does nothing.
    """
    if not is_writer:
        yield lambda step, values: None
        return
    # Imports torch as well where there is one, which takes a while.
    from tensorboardX import SummaryWriter

    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "metrics.jsonl"
    _drop_later(path, last_step)
    with (
        path.open("a", encoding="utf-8") as file,
        SummaryWriter(str(workdir / "tensorboard"), purge_step=last_step + 1) as tensorboard,
    ):

        def write(step: int, values: Mapping[str, float]) -> None:
            file.write(json.dumps({"step": step, **values}) + "\n")
            # A line must be in the file before the checkpoint of its step is.
            file.flush()
            for name, value in values.items():
                tensorboard.add_scalar(name, value, step)

        yield write


@contextlib.contextmanager
def profiler(workdir: Path, steps: range) -> Iterator[Callable[[int, Any], None]]:
    """Traces some steps for xprof, into `profile/` of a work directory.

    Args:
        workdir: The work directory.
        steps: The steps to trace; an empty range traces nothing.

    Yields:
        `before_step(step, state)`, to be called before each step with what the step before made,
        which is waited for at both ends of the trace.
    """
    is_tracing = False

    def before_step(step: int, state: Any) -> None:
        nonlocal is_tracing
        if (step in steps) == is_tracing:
            return
        jax.block_until_ready(state)
        if is_tracing:
            jax.profiler.stop_trace()
        else:
            jax.profiler.start_trace(workdir / "profile")
        is_tracing = not is_tracing

    try:
        yield before_step
    finally:
        if is_tracing:
            jax.profiler.stop_trace()


def layer_norms(params: Params) -> Float[Array, " layers"]:
    """Norm of the parameters, or gradients, of each layer that has any.

    Args:
        params: Trainable parameters or their gradients: a param pytree with None for frozen leaves.

    Returns:
        float32, an entry for each layer with a leaf that is not None, from the bottom up.
    """
    norms = [jnp.zeros((0,), jnp.float32)]
    for segment in params["segments"]:
        squares = [
            sum(_row_squares(leaf) for leaf in leaves)
            for leaves in map(jax.tree.leaves, segment)
            if leaves
        ]
        if squares:
            norms.append(jnp.sqrt(jnp.stack(squares, axis=1)).reshape(-1))
    return jnp.concatenate(norms)


def _row_squares(leaf: Array) -> Array:
    return jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=tuple(range(1, leaf.ndim)))


def speed_metrics(
    step_seconds: Sequence[float],
    *,
    tokens_per_step: int,
    model_flops_per_step: int,
    devices: Sequence[Any],
) -> dict[str, float]:
    """What is reported about the speed of some steps.

    Args:
        step_seconds: How long each of them took.
        tokens_per_step: Tokens a step, over all devices.
        model_flops_per_step: FLOPs a step that training cannot do without (`Costs.model_flops`
            times tokens), over all devices.
        devices: All devices of the mesh, as `jax.devices()`.

    Returns:
        step_seconds (the median), tokens_per_second, tokens_per_second_per_device and
        model_flops_per_second; and, where the devices' peak is known, model_flops_utilisation:
        the share of their bfloat16 peak.
    """
    steps_per_second = len(step_seconds) / max(sum(step_seconds), 1e-9)
    tokens_per_second = steps_per_second * tokens_per_step
    flops_per_second = steps_per_second * model_flops_per_step
    speed = {
        "step_seconds": statistics.median(step_seconds),
        "tokens_per_second": tokens_per_second,
        "tokens_per_second_per_device": tokens_per_second / len(devices),
        "model_flops_per_second": flops_per_second,
    }
    peak = peak_flops(devices[0].device_kind)
    if peak is not None:
        speed["model_flops_utilisation"] = flops_per_second / (peak * len(devices))
    return speed


def memory_metrics(devices: Sequence[Any]) -> dict[str, float]:
    """Memory in use on the fullest device of this process.

    Args:
        devices: All devices of the mesh, as `jax.devices()`.

    Returns:
        device_memory_bytes (now) and device_memory_peak_bytes (since the start); nothing where the
        devices do not tell, as CPUs.
    """
    own = [device for device in devices if device.process_index == jax.process_index()]
    told = [stats for stats in (device.memory_stats() for device in own) if stats]
    names = {
        "device_memory_bytes": "bytes_in_use",
        "device_memory_peak_bytes": "peak_bytes_in_use",
    }
    return {
        name: max(stats[key] for stats in told)
        for name, key in names.items()
        if told and all(key in stats for stats in told)
    }


def _by_name(metrics: Mapping[str, Any], depths: Sequence[int]) -> dict[str, float]:
    """Python numbers; a vector over the trained layers becomes `NAME/DEPTH`."""
    values: dict[str, float] = {}
    for name, array in metrics.items():
        if np.ndim(array) == 0:
            values[name] = float(array)
            continue
        for depth, value in zip(depths, np.asarray(array), strict=True):
            values[f"{name}/{depth}"] = float(value)
    return values


class StepMonitor:
    """Reports each step when the next one is already under way, so the device never waits.

    Args:
        write: From `open_metrics`.
        bar: Shows progress.
        tokens_per_step: Tokens a step.
        model_flops_per_step: FLOPs a step that training cannot do without.
        trained_depths: Depths of the layers that `layer_norms` has entries for.
        devices: All devices of the mesh, as `jax.devices()`.
        log_every: Steps between lines of metrics.
        latest_checkpoint: Gives the step of the latest checkpoint.
        is_writer: Whether this process writes to the screen.
    """

    def __init__(
        self,
        write: WriteMetrics,
        bar: tqdm,
        *,
        tokens_per_step: int,
        model_flops_per_step: int,
        trained_depths: Sequence[int],
        devices: Sequence[Any],
        log_every: int,
        latest_checkpoint: Callable[[], int | None],
        is_writer: bool,
    ):
        self._write = write
        self._bar = bar
        self._measure = functools.partial(
            speed_metrics,
            tokens_per_step=tokens_per_step,
            model_flops_per_step=model_flops_per_step,
            devices=devices,
        )
        self._trained_depths = trained_depths
        self._devices = devices
        self._log_every = log_every
        self._latest_checkpoint = latest_checkpoint
        self._is_writer = is_writer
        self._pending: tuple[int, np.ndarray, Mapping[str, Any]] | None = None
        self._step_seconds: list[float] = []
        self._restart_clock()

    def report_held_out(self, step: int, loss: float) -> None:
        """Writes a held-out loss, in nats a token."""
        self._write(step, {"held_out_loss": loss})
        if self._is_writer:
            tqdm.write(f"step {step}: held-out loss {loss:.4f} nats a token")
        self._restart_clock()

    def _restart_clock(self) -> None:
        # The speed is that of training alone, without evaluation.
        self._since = time.monotonic()

    def observe(self, step: int, records: np.ndarray, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a step, which may still be computed, and reports the one before.

        Args:
            step: Its number, from 1.
            records: Numbers of the records that it was trained on.
            metrics: loss, grad_norm and more: scalar arrays, and vectors as of `layer_norms`.

        Raises:
            DivergedError: Loss or gradient of the step before is not finite.
        """
        self.flush()
        self._pending = (step, records, metrics)

    def flush(self) -> None:
        """Waits for the last step and reports it.

        Raises:
            DivergedError: Its loss or gradient is not finite.
        """
        if self._pending is None:
            return
        step, records, metrics = self._pending
        self._pending = None
        values = _by_name(metrics, self._trained_depths)
        self._refuse_non_finite(step, records, values)
        self._step_seconds.append(time.monotonic() - self._since)
        self._restart_clock()
        self._bar.update()
        if step % self._log_every == 0:
            speed = self._measure(self._step_seconds)
            self._step_seconds = []
            self._write(step, values | speed | memory_metrics(self._devices))
            shown = f"loss {values['loss']:.4f}, {speed['tokens_per_second']:,.0f} tokens/s"
            if "model_flops_utilisation" in speed:
                shown += f", {speed['model_flops_utilisation']:.0%} of peak"
            self._bar.set_postfix_str(shown)

    def _refuse_non_finite(
        self, step: int, records: np.ndarray, values: Mapping[str, float]
    ) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                latest = self._latest_checkpoint()
                good = "there is none yet" if latest is None else f"step {latest}"
                raise DivergedError(
                    f"training stopped: {name} is {values[name]} at step {step}, on records "
                    f"{records.tolist()}; last good checkpoint: {good}; look at the records, or "
                    "lower optimizer.learning_rate in another --workdir"
                )
