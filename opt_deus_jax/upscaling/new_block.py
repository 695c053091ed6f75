"""What every way of making a new block takes and gives."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from scipy import sparse

from opt_deus_jax.transport.diagnostics import MapPicture, MatrixReport

Block = Mapping[str, np.ndarray]
# Sparse where it is a permutation or nearly one.
TransportMap = np.ndarray | sparse.csr_array


class OnRead(Mapping[str, np.ndarray]):
    """Arrays that are made each time they are read, and so in memory only while they are used."""

    def __init__(self, make: Callable[[str], np.ndarray], names: Iterable[str]):
        """Makes none yet."""
        self._make = make
        self._names = dict.fromkeys(names)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Fused(NamedTuple):
    """A new block and what is known about its making.

    Attributes:
        block: float32 arrays by parameter name.
        reports: One per matrix that was transported.
        maps: The map [m, n] that was applied to each matrix (as map' W_A), where it exists as a
            table.
        pictures: What is drawn of every map.
    """

    block: dict[str, np.ndarray]
    reports: tuple[MatrixReport, ...]
    maps: Mapping[str, TransportMap]
    pictures: Mapping[str, MapPicture] = MappingProxyType({})
