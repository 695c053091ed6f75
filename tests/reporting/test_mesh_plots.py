import jax
import pytest

from opt_deus_jax.config import MeshConfig
from opt_deus_jax.distributed.compiled_report import ChipMemory, CompiledReport, Roofline
from opt_deus_jax.distributed.hlo_costs import HloCosts
from opt_deus_jax.distributed.mesh import make_mesh
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import named_tensors
from opt_deus_jax.reporting.mesh_plots import compiled_figure, sharding_figure
from tests.training.tiny import tiny_hf_config

_CONFIG = read_model_config(tiny_hf_config())


def _parts(mesh: MeshConfig) -> tuple[dict[str, list[tuple[float, ...]]], dict[str, list[str]]]:
    """By panel the rectangles, and the chips written into them."""
    figure = sharding_figure(_CONFIG, make_mesh(mesh, jax.devices()), (8, 16))
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes[:-1]}
    return (
        {name: [p.get_bbox().bounds for p in axis.patches] for name, axis in panels.items()},  # pyright: ignore
        {name: [text.get_text() for text in axis.texts] for name, axis in panels.items()},
    )


def test_kernels_are_drawn_in_the_parts_that_chips_hold() -> None:
    parts, chips = _parts(MeshConfig(data=2, fsdp=2, tensor=2))
    assert set(parts) == {
        *("query", "key", "value", "output"),
        *("gate", "up", "down", "embedding", "batch"),
    }
    # Heads are cut along tensor, width along fsdp; both groups of data hold the same.
    assert parts["query"] == [
        (0, 0, 16, 16),
        (0, 16, 16, 16),
        (16, 0, 16, 16),
        (16, 16, 16, 16),
    ]
    assert chips["query"] == ["0, 4", "1, 5", "2, 6", "3, 7"]
    assert parts["batch"] == [(0, 2 * i, 16, 2) for i in range(4)]
    assert chips["batch"] == ["0, 1", "2, 3", "4, 5", "6, 7"]


@pytest.mark.parametrize(
    "mesh", [MeshConfig(), MeshConfig(data=-1, fsdp=1), MeshConfig(data=2, fsdp=2, tensor=2)]
)
def test_the_title_says_what_a_chip_holds(mesh: MeshConfig) -> None:
    devices = make_mesh(mesh, jax.devices())
    title = sharding_figure(_CONFIG, devices, (8, 16)).get_suptitle().replace("\n", " ")
    held = sum(_size_on_a_chip(spec, devices) for _, spec in named_tensors(_CONFIG, 4))
    total = sum(spec.size for _, spec in named_tensors(_CONFIG, 4))
    assert f"holds {held / total:.1%} of" in title


def _size_on_a_chip(spec, mesh) -> int:
    """What JAX itself puts on the first device."""
    from opt_deus_jax.distributed.sharding import named_sharding

    array = jax.device_put(jax.numpy.zeros(spec.shape), named_sharding(mesh, *spec.logical_axes))
    return array.addressable_shards[0].data.size


@pytest.mark.parametrize(("temporaries", "verdict"), [(3e9, "fits"), (30e9, "does not fit")])
def test_a_compiled_step_is_drawn_with_its_limit(temporaries: float, verdict: str) -> None:
    report = CompiledReport(
        topology="v5e:2x2",
        num_chips=4,
        hbm_bytes=int(16e9),
        memory=ChipMemory(int(5e9), int(2e9), int(2e9), int(temporaries), 0),
        costs=HloCosts(0, 0, {}, ()),
        roofline=Roofline(0.2, 0.3, 0.1),
        tokens=1024,
        model_flops=1,
        utilisation=0.4,
        compile_seconds=1.0,
    )
    title = compiled_figure(report).get_suptitle().replace("\n", " ")
    assert f"the step {verdict}, {5 + temporaries / 1e9:.1f} of 16.0 GB" in title
    assert "memory traffic bound it to 300.0 ms or more" in title
