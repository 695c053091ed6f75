import importlib.util

import pytest

from opt_deus_jax.distributed.topology import CHIPS, parse_topology, topology_devices
from opt_deus_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "shape", "num_chips"),
    [("v5p:4x4x4", (4, 4, 4), 64), ("v5e:4x4", (4, 4), 16), ("v6e:16x16", (16, 16), 256)],
)
def test_a_slice_is_read_and_named(text: str, shape: tuple[int, ...], num_chips: int) -> None:
    topology = parse_topology(text)
    assert topology.shape == shape
    assert topology.num_chips == num_chips
    assert topology.chip is CHIPS[text[:3]]
    assert topology.name == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5p", r"--topology='v5p': use CHIP:AxB or CHIP:AxBxC"),
        ("v5p:4", "use CHIP:AxB"),
        ("v5p:4x4x4x4", "use CHIP:AxB"),
        ("h100:2x2", "unknown chip 'h100'; use v5e, v5p, v6e"),
    ],
)
def test_another_name_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_topology(text)


@pytest.mark.parametrize("text", ["v5e:2x2", "v5p:2x2x4", "v6e:4x4"])
def test_a_slice_has_a_device_a_chip(text: str) -> None:
    pytest.importorskip("libtpu")
    topology = parse_topology(text)
    devices = topology_devices(topology)
    assert len(devices) == topology.num_chips
    assert {device.platform for device in devices} == {"tpu"}


def test_a_slice_that_is_not_built_is_refused() -> None:
    pytest.importorskip("libtpu")
    with pytest.raises(UserError, match="--topology=v5e:3x3: libtpu has no such slice"):
        topology_devices(parse_topology("v5e:3x3"))


def test_without_libtpu_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"install opt_deus_jax\[tpu\]"):
        topology_devices(parse_topology("v5e:2x2"))
