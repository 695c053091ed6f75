"""Training processes that start fast."""

import multiprocessing
from pathlib import Path
from typing import Any

import jax
import pytest


@pytest.fixture(scope="package")
def children(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Starts processes as forks of one that has imported JAX but not used it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("JAX_NUM_CPU_DEVICES", str(len(jax.devices())))
        patch.setenv("JAX_CPU_COLLECTIVES_IMPLEMENTATION", "gloo")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["tests.training.test_kills", "tests.training.test_processes"]
        )
        yield context
