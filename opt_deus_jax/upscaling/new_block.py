"""What every way of making a new block takes and gives."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from scipy import sparse

from opt_deus_jax.transport.diagnostics import MapPicture, MatrixReport

Block = Mapping[str, np.ndarray]
# Sparse where it is a permutation or nearly one.
TransportMap = np.ndarray | sparse.csr_array


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
