"""The base as an expansion reads it: checked, hashed, a parameter in memory at a time."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from opt_deus_jax.checkpoints.hf import hash_array
from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.params import block_specs


class BaseTensors:
    """Reads tensors, refuses those that are not finite, and hashes each once.

    Several threads may read: at worst two of them hash the same tensor.

    Attributes:
        hashes: sha256 of each tensor that was read.
    """

    def __init__(self, source: CheckpointSource):
        """Reads from a checkpoint."""
        self._source = source
        self.hashes: dict[str, str] = {}

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor in its own dtype.

        Raises:
            UserError: It holds NaN or Inf.
        """
        array = self._source.read(name)
        if not np.isfinite(array).all():
            raise UserError(
                f"{self._source.name}: tensor {name} holds NaN or Inf; fetch the checkpoint again"
            )
        if name not in self.hashes:
            self.hashes[name] = hash_array(array)
        return array

    def first_changed(self, hashes: Mapping[str, str]) -> str | None:
        """The first tensor that has another hash than the one given; None where none has.

        Args:
            hashes: sha256 by name, as a killed expansion has noted them.
        """
        for name, digest in hashes.items():
            if name not in self.hashes:
                self.read(name)
            if self.hashes[name] != digest:
                return name
        return None


class Parent(Mapping[str, np.ndarray]):
    """A block of the base in float32, of which a parameter is in memory only while it is used."""

    def __init__(self, read: Callable[[str], np.ndarray], config: ModelConfig, layer: int):
        """Names the block's tensors; reads none."""
        self._read = read
        self._names = {
            name: spec.hf_name.format(layer=layer)
            for name, spec in block_specs(config, config.layer_kinds[layer]).items()
        }

    def __getitem__(self, name: str) -> np.ndarray:
        return self._read(self._names[name]).astype(np.float32, copy=False)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
