"""Eight fake CPU devices; implicit rank promotion is an error."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# transformers warns about a missing torchvision or accelerate only through logging.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests compile much and compute little: nine tenths of their time is the compiler's.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
)

import jax
import pytest

from tests.children import forks

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
def children() -> Any:
    """Starts processes as forks of one that has imported JAX but not used it."""
    return forks()


@pytest.fixture(autouse=True)
def _leave_what_earlier_tests_made_to_itself() -> Iterator[None]:
    """JAX keeps what it traced; without this, each collection goes through all of it again."""
    yield
    gc.collect()
    gc.freeze()
