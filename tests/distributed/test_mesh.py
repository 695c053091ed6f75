import jax
import pytest
from jax.sharding import AxisType

from opt_deus_jax.config import MeshConfig
from opt_deus_jax.distributed.mesh import MESH_AXES, make_mesh, mesh_shape
from opt_deus_jax.distributed.topology import parse_topology, topology_devices
from opt_deus_jax.errors import UserError


@pytest.mark.parametrize(
    ("mesh", "shape"),
    [
        (MeshConfig(), (1, 8, 1)),
        (MeshConfig(data=-1, fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=1, fsdp=1, tensor=-1), (1, 1, 8)),
        (MeshConfig(data=4, fsdp=2), (4, 2, 1)),
    ],
)
def test_one_axis_takes_what_is_left(mesh: MeshConfig, shape: tuple[int, int, int]):
    assert mesh_shape(mesh, 8) == shape
    made = make_mesh(mesh, jax.devices())
    assert made.axis_names == MESH_AXES
    assert made.devices.shape == shape
    assert made.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
    ("slice_", "mesh"),
    [("v5p:2x4x4", MeshConfig(data=2, fsdp=8, tensor=2)), ("v5e:4x4", MeshConfig(data=2, fsdp=8))],
)
def test_an_axis_may_take_half_of_a_dimension_of_a_slice(slice_: str, mesh: MeshConfig):
    pytest.importorskip("libtpu")
    devices = topology_devices(parse_topology(slice_))
    made = make_mesh(mesh, devices)
    assert made.devices.shape == (mesh.data, mesh.fsdp, mesh.tensor)
    assert {device.id for device in made.devices.flat} == {device.id for device in devices}


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(fsdp=4), r"mesh \(data 1 x fsdp 4 x tensor 1\) does not match the 8 devices"),
        (MeshConfig(tensor=3), "does not match the 8 devices"),
        (MeshConfig(data=-1), "config field mesh.fsdp=-1: only one axis"),
        (MeshConfig(data=0), "config field mesh.data=0: use a positive number, or -1"),
        (MeshConfig(tensor=-2), "config field mesh.tensor=-2"),
    ],
)
def test_a_mesh_that_does_not_match_is_refused(mesh: MeshConfig, message: str):
    with pytest.raises(UserError, match=message):
        mesh_shape(mesh, 8)
