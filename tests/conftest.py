"""Eight fake CPU devices; implicit rank promotion is an error."""

import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

# transformers warns about a missing torchvision or accelerate only through logging.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests compile much and compute little.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the folders with the longest files first, so that no process waits for another's last.

    pytest-xdist hands out whole files in this order.
    """
    first = ("entry", "upscaling", "training")
    folders = [Path(__file__).parent / name for name in first]

    def rank(item: pytest.Item) -> int:
        within = [number for number, folder in enumerate(folders) if folder in item.path.parents]
        return within[0] if within else len(folders)

    items.sort(key=rank)


@pytest.fixture(scope="session")
def children(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Starts processes as forks of one that has imported JAX but not used it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "tests.training.test_kills",
            "tests.training.test_processes",
            "tests.upscaling.expanding_process",
        ]
    )
    # Forks have the environment in which their server was started; no other test may see it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("JAX_NUM_CPU_DEVICES", str(len(jax.devices())))
        patch.setenv("JAX_CPU_COLLECTIVES_IMPLEMENTATION", "gloo")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        forkserver.ensure_running()
    return context
