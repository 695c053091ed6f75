"""What the forward pass stores for the backward pass, read from the jaxpr of the gradient."""

import contextlib
from typing import Any

import jax
import pytest

from opt_deus_jax.config import MeshConfig, TrainingConfig
from opt_deus_jax.distributed.mesh import make_mesh
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import block_specs
from opt_deus_jax.training.segments import plan_segments, select_trained
from opt_deus_jax.upscaling.layout import plan_layout
from tests.jaxprs import scans
from tests.training.gradients import gradient_jaxpr
from tests.training.tiny import tiny_hf_config

CONFIG = read_model_config(tiny_hf_config())
EXPERTS = read_model_config(
    tiny_hf_config(model_type="mixtral", num_local_experts=6, num_experts_per_tok=2)
)

_EXPERT_KERNELS = ((48, 32), (32, 48))


def stacked_outputs(scan: Any) -> list[tuple[int, ...]]:
    """Shapes of what a scan hands on from each of its steps, beside the carry."""
    return [variable.aval.shape for variable in scan.outvars[scan.params["num_carry"] :]]


@pytest.mark.parametrize("remat", ["none", "matmuls", "block"])
@pytest.mark.parametrize(
    ("layout", "trained", "frozen", "with_backward"),
    [
        ("top", "new", 1, 1),
        # A frozen prefix, the new layers, and frozen ones that the gradient passes through.
        ("middle", "new", 1, 2),
        ("uniform", "new", 1, 3),
        ("top", r"layers\.[45]\..*mlp", 1, 1),
        ("top", "embed_tokens", 0, 1),
        ("stack", "all", 0, 1),
    ],
)
def test_only_what_lies_above_a_trained_parameter_stores_residuals(
    layout: str, trained: str, frozen: int, with_backward: int, remat: str
):
    is_new = [origin.is_new for origin in plan_layout(layout, 4, 2)]
    names = select_trained(CONFIG, is_new, trained)
    training = TrainingConfig(remat=remat)
    *found, loss = [
        scan
        for scan in scans(gradient_jaxpr(CONFIG, names, training, 2, 8))
        if not scan.params["reverse"]
    ]
    assert stacked_outputs(loss) == [(1, 2, 8, CONFIG.width)]
    segments = plan_segments(names.blocks)
    assert [scan.params["length"] for scan in found] == [segment.repeats for segment in segments]
    assert [len(stacked_outputs(scan)) > 0 for scan in found] == (
        [False] * frozen + [True] * with_backward
    )


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", ["none", "matmuls", "block"])
def test_no_kernel_is_stored_a_second_time(remat: str, compute_dtype: str):
    names = select_trained(CONFIG, [False, False, True, False, True, False], "new")
    training = TrainingConfig(remat=remat, compute_dtype=compute_dtype)
    kernels = {spec.shape for spec in block_specs(CONFIG).values() if len(spec.shape) == 2}
    # 18 tokens: activations, which are stored flat, have no kernel's shape.
    for scan in scans(gradient_jaxpr(CONFIG, names, training, 2, 9)):
        if not scan.params["reverse"]:
            assert not kernels & {shape[1:] for shape in stacked_outputs(scan)}


@pytest.mark.parametrize("shape", [None, (1, 2, 2)])
@pytest.mark.parametrize("remat", ["none", "matmuls", "block"])
def test_no_kernel_of_an_expert_is_stored_a_second_time(
    remat: str, shape: tuple[int, int, int] | None
):
    names = select_trained(EXPERTS, [False, False, True, False], "new")
    training = TrainingConfig(remat=remat, experts="grouped")
    mesh = None if shape is None else make_mesh(MeshConfig(*shape), jax.devices()[:4])
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        jaxpr = gradient_jaxpr(EXPERTS, names, training, 2, 9)
    found = scans(jaxpr)
    assert any(stacked_outputs(scan) for scan in found)
    for scan in found:
        if not scan.params["reverse"]:
            # Of however many experts: a mesh stores what each device has one after another.
            kernels = [shape for shape in stacked_outputs(scan) if shape[2:] in _EXPERT_KERNELS]
            assert not kernels
