"""What a checkpoint that is read looks like to the rest of the project, whatever its format."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensor takes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint opened for reading, one tensor at a time.

    Attributes:
        name: What the user called it.
        hf_config: The content of its Hugging Face `config.json`.
        tensors: Every tensor by its Hugging Face name, unread.
        read: Reads one tensor by name, in its own dtype (bfloat16 through ml_dtypes).
        side_files: Files that go with it unchanged (tokenizer, chat template, generation
            settings), by file name.
        read_slice: Reads a part of a tensor, one slice an axis, and no other bytes of it; None
            where the format has no rows of plain numbers.
    """

    name: str
    hf_config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    read: Callable[[str], np.ndarray]
    side_files: Mapping[str, bytes]
    read_slice: Callable[[str, tuple[slice, ...]], np.ndarray] | None = None

    def read_part(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a tensor, one slice an axis, in its own dtype."""
        if self.read_slice is None:
            return self.read(name)[part]
        return self.read_slice(name, part)
