"""Several real processes over loopback share an expansion, and end in the bytes of one."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from opt_deus_jax.checkpoints import journal
from tests.children import end, start
from tests.llama_checkpoints import hf_config, random_tensors, write_directory
from tests.upscaling.expanding_process import expand_here

CONFIG = hf_config(intermediate_size=32, num_key_value_heads=4)
PATIENCE = 300


def written(directory: Path) -> int:
    return journal.count_written(directory / "grown.partial")


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (directory / "grown").iterdir()}


def said_by(directory: Path, count: int) -> list[list[str]]:
    return [json.loads((directory / f"said_{i}.json").read_text()) for i in range(count)]


def test_two_processes_one_killed_then_three_end_in_the_bytes_of_one(children: Any, tmp_path: Path):
    tensors = random_tensors(CONFIG)
    write_directory(tmp_path / "base", CONFIG, tensors)
    write_directory(tmp_path / "alone" / "base", CONFIG, tensors)
    assert end(start(children, expand_here, 1, tmp_path / "alone", (0,)), PATIENCE) == [0]

    started = start(children, expand_here, 2, tmp_path, (0.1, 0.1))
    # Until both have written something.
    while not list((tmp_path / "grown.partial").glob(f"model-0000[6-9]*.{journal.FILE_NAME}")):
        assert all(process.is_alive() for process in started)
        time.sleep(0.05)
    while written(tmp_path) < 40:
        assert all(process.is_alive() for process in started)
        time.sleep(0.05)
    started[1].kill()
    assert 0 not in end(started, PATIENCE)
    assert not (tmp_path / "grown").exists()

    kept = written(tmp_path)
    assert end(start(children, expand_here, 3, tmp_path, (0, 0, 0)), PATIENCE) == [0, 0, 0]
    assert content(tmp_path) == content(tmp_path / "alone")
    manifests = {(tmp_path / f"manifest_{i}.json").read_text() for i in range(3)}
    assert manifests == {(tmp_path / "alone" / "manifest_0.json").read_text()}
    numbers = [
        int(line.split(": ")[1].split(" of ")[0]) for said in said_by(tmp_path, 3) for line in said
    ]
    assert sum(numbers) == kept >= 40


def test_an_error_in_one_process_ends_both_with_it(children: Any, tmp_path: Path):
    tensors = random_tensors(CONFIG)
    # Only the second process reads it; the first would be busy for a minute and a half.
    tensors["model.norm.weight"][3] = np.nan
    write_directory(tmp_path / "base", CONFIG, tensors)
    assert end(start(children, expand_here, 2, tmp_path, (2, 0)), PATIENCE) == [1, 1]
    first, second = said_by(tmp_path, 2)
    assert first == second
    assert len(first) == 1
    assert "tensor model.norm.weight holds NaN or Inf; fetch" in first[0]
    assert not list(tmp_path.glob("grown*"))
