"""The base as an expansion reads it: checked, hashed, a parameter in memory at a time."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from opt_deus_jax.checkpoints.hf import hash_array
from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.params import block_specs


class BaseTensors:
    """Reads tensors, refuses those that are not finite, and hashes each once.

    Attributes:
        hashes: sha256 of each tensor that was read, now or by an expansion that is gone on with.
    """

    def __init__(self, source: CheckpointSource):
        """Reads from a checkpoint."""
        self._source = source
        self._new: dict[str, str] = {}
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
            self.hashes[name] = self._new[name] = hash_array(array)
        return array

    def take_new_hashes(self) -> dict[str, str]:
        """Those that were made since the last call."""
        new, self._new = self._new, {}
        return new


def changed_tensor(source: CheckpointSource, notes: Iterable[Mapping[str, Any]]) -> str | None:
    """The first tensor whose hash is not the one that was noted under `base`; None where all are.

    Args:
        source: The base, of which every noted tensor is read again.
        notes: Of the tensors that a killed expansion has written.
    """
    for note in notes:
        for name, digest in note.get("base", {}).items():
            if hash_array(source.read(name)) != digest:
                return name
    return None


class Parent(Mapping[str, np.ndarray]):
    """A block of the base in float32, of which a parameter is in memory only while it is used."""

    def __init__(self, base: BaseTensors, config: ModelConfig, layer: int):
        """Names the block's tensors; reads none."""
        self._base = base
        self._names = {
            name: spec.hf_name.format(layer=layer)
            for name, spec in block_specs(config, config.layer_kinds[layer]).items()
        }

    def __getitem__(self, name: str) -> np.ndarray:
        return self._base.read(self._names[name]).astype(np.float32, copy=False)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
