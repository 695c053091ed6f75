"""The devices as a mesh of three named axes."""

import math
from collections.abc import Sequence
from typing import Any

from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh

from opt_deus_jax.config import MeshConfig
from opt_deus_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")


def mesh_shape(mesh: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Sizes of the three axes, the one that is -1 filled in.

    Args:
        mesh: The settings.
        num_devices: How many devices there are.

    Returns:
        (data, fsdp, tensor), whose product is `num_devices`.

    Raises:
        UserError: A size is neither positive nor -1, several are -1, or the product differs.
    """
    sizes = {name: getattr(mesh, name) for name in MESH_AXES}
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"config field mesh.{name}={size}: use a positive number, or -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [name for name, size in sizes.items() if size == -1]
    written = " x ".join(f"{name} {size}" for name, size in sizes.items())
    if len(free) > 1:
        raise UserError(f"config field mesh.{free[1]}=-1: only one axis can take what is left")
    if num_devices % fixed or (not free and fixed != num_devices):
        raise UserError(
            f"config field mesh ({written}) does not match the {num_devices} devices; the product "
            "must be their number, one axis may be -1"
        )
    sizes |= dict.fromkeys(free, num_devices // fixed)
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def make_mesh(mesh: MeshConfig, devices: Sequence[Any]) -> Mesh:
    """Arranges devices so that neighbours on the network are neighbours on the mesh.

    Args:
        mesh: The settings.
        devices: All devices of all processes, as `jax.devices()`.

    Returns:
        A mesh with the axes `MESH_AXES`, all of type Auto: the compiler spreads what the
        constraints leave open.

    Raises:
        UserError: The mesh does not match the number of devices.
    """
    shape = mesh_shape(mesh, len(devices))
    # An axis may need half of a dimension of the slice: data=2, fsdp=8 of 2x4x4, for instance.
    arranged = create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(arranged, MESH_AXES, (AxisType.Auto,) * 3)
