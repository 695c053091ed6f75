"""What a process of a shared expansion runs; imports little, since many are started."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.config import UpscaleConfig
from opt_deus_jax.distributed.team import whole_program
from opt_deus_jax.errors import UserError
from opt_deus_jax.reporting.plots import plot_diagnostics
from opt_deus_jax.upscaling.expand import expand_checkpoint
from tests.children import join, leave


def expand_here(
    directory: Path, pauses: tuple[float, ...], address: str, count: int, index: int
) -> None:
    """Expands the folder's base, of which it reads a tensor after each pause of its own."""
    jax.config.update("jax_num_cpu_devices", 2)
    join(address, count, index)
    source = open_checkpoint(str(directory / "base"))

    def read(name: str) -> np.ndarray:
        time.sleep(pauses[index])
        return source.read(name)

    said: list[str] = []
    try:
        made = expand_checkpoint(
            dataclasses.replace(source, read=read),
            UpscaleConfig(num_new_layers=3),
            directory / "grown",
            probe_BT=np.arange(40, dtype=np.int32).reshape(2, 20),
            max_shard_bytes=30_000,
            # As many gaps at once as devices, and one.
            devices=jax.local_devices()[: 2 - index % 2],
            team=whole_program(),
            draw=plot_diagnostics,
            say=said.append,
        )
    except UserError as error:
        said.append(str(error))
        sys.exit(1)
    finally:
        (directory / f"said_{index}.json").write_text(json.dumps(said))
        leave()
    (directory / f"manifest_{index}.json").write_text(json.dumps(dataclasses.asdict(made.manifest)))
