"""Metrics as JSON lines and for TensorBoard."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tensorboardX import SummaryWriter

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
