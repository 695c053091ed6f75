"""Gaps that are fused before they are written, several devices at a time."""

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import jax

from opt_deus_jax.errors import UserError
from opt_deus_jax.upscaling.layout import LayerOrigin

_T = TypeVar("_T")


def fusing_devices(gaps_at_once: int) -> list[Any]:
    """The devices that fuse a gap each.

    Args:
        gaps_at_once: How many; 0 for as many as this process has accelerators, on a CPU one.

    Raises:
        UserError: There are not so many.
    """
    local = jax.local_devices()
    if not 0 <= gaps_at_once <= len(local):
        raise UserError(
            f"--gaps_at_once={gaps_at_once}: each gap takes a device, and this process has "
            f"{len(local)} ({local[0].platform}); use 1 to {len(local)}, or 0 for all accelerators"
        )
    on_cpu = local[0].platform == "cpu"
    return local[: gaps_at_once or (1 if on_cpu else len(local))]


class Lookahead(Generic[_T]):
    """Makes new layers for one that takes them in order.

    With one device each is made when it is asked for. With more, each has a thread, and layers are
    made ahead: at no time are there more of them, in the making or not let go of, than devices.
    """

    def __init__(
        self,
        make: Callable[[LayerOrigin], _T],
        layers: Sequence[LayerOrigin],
        devices: Sequence[Any],
    ):
        """Begins with nothing.

        Args:
            make: Makes a layer, on the default device.
            layers: All that will be taken.
            devices: Where; none for the default device.
        """
        self._make, self._layers, self._devices = make, layers, devices
        self._places = {origin.depth: place for place, origin in enumerate(layers)}
        self._futures: dict[int, concurrent.futures.Future[_T]] = {}
        self._begun = 0
        self._pool = (
            concurrent.futures.ThreadPoolExecutor(len(devices)) if len(devices) > 1 else None
        )

    def take(self, origin: LayerOrigin) -> _T:
        """The next layer; those before it are let go of."""
        if self._pool is None:
            return self._make(origin)
        place = self._places[origin.depth]
        self._begin(place + len(self._devices))
        return self._futures.pop(place).result()

    def let_go(self, origin: LayerOrigin) -> None:
        """Says that nothing of a layer is held any more; the next may be begun."""
        if self._pool is not None:
            self._begin(self._places[origin.depth] + 1 + len(self._devices))

    def close(self) -> None:
        """Begins no more, and waits for what is being made: a thread cannot be ended."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _begin(self, end: int) -> None:
        assert self._pool is not None
        for place in range(self._begun, min(end, len(self._layers))):
            # The layer that had this device before is taken, so the device is free.
            device = self._devices[place % len(self._devices)]
            future = self._pool.submit(self._make_on, device, self._layers[place])
            self._futures[place] = future
            self._begun = place + 1

    def _make_on(self, device: Any, origin: LayerOrigin) -> _T:
        with jax.default_device(device):
            return self._make(origin)
