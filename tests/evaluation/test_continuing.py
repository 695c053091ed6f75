"""Prompts continued by several processes that hold the model together."""

import json
from pathlib import Path
from typing import Any

import jax

from opt_deus_jax.evaluation.continuing import continue_prompts
from opt_deus_jax.evaluation.loading import load_model
from tests.children import end, join, start

PROMPTS = [[5, 17, 3], [8, 60, 61, 2, 9, 33, 12], [44]]


def continued(checkpoint: Path) -> list[list[int]]:
    return continue_prompts(load_model(str(checkpoint)), PROMPTS, max_new_tokens=6)


def continue_here(checkpoint: Path, directory: Path, address: str, count: int, index: int) -> None:
    """What each process runs."""
    jax.config.update("jax_num_cpu_devices", 1)
    join(address, count, index)
    (directory / f"{index}.json").write_text(json.dumps(continued(checkpoint)))


def test_each_process_has_all_of_the_text(children: Any, checkpoint: Path, tmp_path: Path) -> None:
    assert end(start(children, continue_here, 2, checkpoint, tmp_path), 200) == [0, 0]
    together = [json.loads((tmp_path / f"{index}.json").read_text()) for index in range(2)]
    assert together == [continued(checkpoint)] * 2
    assert len(together[0][0]) == 6
