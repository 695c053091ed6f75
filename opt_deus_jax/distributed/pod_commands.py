"""The commands that start a training on a slice, for the scripts in experiments/launch."""

import shlex
from collections.abc import Sequence

from opt_deus_jax.distributed.topology import Topology

# XPK's names; it counts the cores of a v5p, of which a chip has two.
_XPK_NAMES = {"v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}


def xpk_type(topology: Topology) -> str:
    """The slice as XPK names it, such as `v5p-64` for v5p:2x4x4."""
    name, cores = _XPK_NAMES[topology.chip.name]
    return f"{name}-{cores * topology.num_chips}"


def tpu_vm_command(
    config: str, workdir: str, arguments: Sequence[str] = (), *, name: str, zone: str
) -> str:
    """The command that trains on a TPU VM, from a machine with gcloud.

    Args:
        config: As of `--config`.
        workdir: Folder that all hosts have mounted.
        arguments: Passed on to the launchers.
        name: Of the TPU VM.
        zone: Where it is.

    Returns:
        A line of shell.
    """
    settings = {"TPU_NAME": name, "ZONE": zone, "CONFIG": config, "WORKDIR": workdir}
    return _command(settings, "tpu_vm.sh", arguments)


def xpk_command(
    config: str,
    workdir: str,
    topology: Topology,
    arguments: Sequence[str] = (),
    *,
    cluster: str,
    project: str,
    zone: str,
    workload: str,
    image: str,
    storage: str,
) -> str:
    """The command that trains on a slice of a GKE cluster made by XPK.

    Args:
        config: As of `--config`.
        workdir: Folder on the storage.
        topology: The slice.
        arguments: Passed on to the launchers.
        cluster: The XPK cluster.
        project: Its Google Cloud project.
        zone: Where it is.
        workload: A new name.
        image: Container image with the checkout as its working directory.
        storage: Storage that is attached to the cluster.

    Returns:
        A line of shell.
    """
    settings = {"CLUSTER": cluster, "PROJECT": project, "ZONE": zone, "WORKLOAD": workload}
    settings |= {"TPU_TYPE": xpk_type(topology), "IMAGE": image, "STORAGE": storage}
    return _command(settings | {"CONFIG": config, "WORKDIR": workdir}, "xpk.sh", arguments)


def _command(settings: dict[str, str], script: str, arguments: Sequence[str]) -> str:
    words = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    return " ".join([*words, f"experiments/launch/{script}", *map(shlex.quote, arguments)])
