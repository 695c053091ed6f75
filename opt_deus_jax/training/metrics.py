"""Metrics as JSON lines, for TensorBoard and on the screen."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from opt_deus_jax.errors import UserError

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
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def open_metrics(workdir: Path, last_step: int) -> Iterator[WriteMetrics]:
    """Opens `metrics.jsonl` and `tensorboard/` of a work directory for appending.

    Args:
        workdir: The work directory.
        last_step: What was written about later steps is dropped: they are about to be repeated.
            -1 drops everything.

    Yields:
        A function that writes named values of a step.
    """
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


class StepMonitor:
    """Reports each step when the next one is already under way, so the device never waits.

    Args:
        write: From `open_metrics`.
        bar: Shows progress.
        tokens_per_step: Tokens predicted a step.
        log_every: Steps between lines of metrics.
        latest_checkpoint: Gives the step of the latest checkpoint.
    """

    def __init__(
        self,
        write: WriteMetrics,
        bar: tqdm,
        *,
        tokens_per_step: int,
        log_every: int,
        latest_checkpoint: Callable[[], int | None],
    ):
        self._write = write
        self._bar = bar
        self._tokens_per_step = tokens_per_step
        self._log_every = log_every
        self._latest_checkpoint = latest_checkpoint
        self._pending: tuple[int, np.ndarray, Mapping[str, Any]] | None = None
        self._restart_clock()

    def report_held_out(self, step: int, loss: float) -> None:
        """Writes a held-out loss, in nats a token."""
        self._write(step, {"held_out_loss": loss})
        tqdm.write(f"step {step}: held-out loss {loss:.4f} nats a token")
        self._restart_clock()

    def _restart_clock(self) -> None:
        # The speed is that of training alone, without evaluation.
        self._since, self._steps_since = time.monotonic(), 0

    def observe(self, step: int, records: np.ndarray, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a step, which may still be computed, and reports the one before.

        Args:
            step: Its number, from 1.
            records: Numbers of the records that it was trained on.
            metrics: loss, grad_norm and more, as scalar arrays.

        Raises:
            UserError: Loss or gradient of the step before is not finite.
        """
        self.flush()
        self._pending = (step, records, metrics)

    def flush(self) -> None:
        """Waits for the last step and reports it.

        Raises:
            UserError: Its loss or gradient is not finite.
        """
        if self._pending is None:
            return
        step, records, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in metrics.items()}
        self._refuse_non_finite(step, records, values)
        self._steps_since += 1
        self._bar.update()
        if step % self._log_every == 0:
            elapsed = max(time.monotonic() - self._since, 1e-9)
            speed = self._steps_since * self._tokens_per_step / elapsed
            self._write(step, values | {"tokens_per_second": speed})
            self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {speed:,.0f} tokens/s")
            self._restart_clock()

    def _refuse_non_finite(
        self, step: int, records: np.ndarray, values: Mapping[str, float]
    ) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                latest = self._latest_checkpoint()
                good = "there is none yet" if latest is None else f"step {latest}"
                raise UserError(
                    f"training stopped: {name} is {values[name]} at step {step}, on records "
                    f"{records.tolist()}; last good checkpoint: {good}; look at the records, or "
                    "lower optimizer.learning_rate in another --workdir"
                )
