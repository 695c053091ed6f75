"""The base as an expansion reads it: checked, hashed, a parameter in memory at a time."""

from collections.abc import Callable, Mapping

import numpy as np

from opt_deus_jax.checkpoints.hf import hash_array
from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.params import block_specs
from opt_deus_jax.upscaling.new_block import Block, OnRead


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


def parent_block(read: Callable[[str], np.ndarray], config: ModelConfig, layer: int) -> Block:
    """A block of the base in float32, of which a parameter is in memory only while it is used.

    Args:
        read: Reads a tensor by its Hugging Face name, as `BaseTensors.read`.
        config: The base's network.
        layer: Of the base.

    Returns:
        Arrays by the names of `block_specs`; none is read yet.
    """
    names = {
        name: spec.hf_name.format(layer=layer)
        for name, spec in block_specs(config, config.layer_kinds[layer]).items()
    }
    return OnRead(lambda name: read(names[name]).astype(np.float32, copy=False), names)
