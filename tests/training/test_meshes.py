"""Every arrangement of eight devices computes what one device computes."""

import functools
import re
from typing import Any

import jax
import numpy as np
import pytest

from opt_deus_jax.config import MeshConfig, OptimizerConfig, TrainingConfig
from opt_deus_jax.distributed.mesh import make_mesh
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import block_specs
from opt_deus_jax.training.optimizer import learning_rate_schedule, make_optimizer
from opt_deus_jax.training.placement import local_rows, param_shardings, place, put_rows
from opt_deus_jax.training.segments import (
    invert_mask,
    plan_segments,
    select_trained,
    trained_mask,
)
from opt_deus_jax.training.step import initial_state, make_train_step, mean_loss_and_gradients
from opt_deus_jax.training.weights import load_params
from tests.training.tiny import tiny_source

F, T = False, True
LAYOUTS = {
    "top": ([F, F, F, T, F, T, F], "new"),
    "uniform": ([F, F, T, F, F, T], "new"),
    "stack": ([F, F, F, F], "all"),
}
SHAPES = [(d, f, 8 // (d * f)) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if 8 % (d * f) == 0]
BATCH, LENGTH = 16, 12


@functools.cache
def source(depth: int) -> Any:
    # Kernels about as large as trained ones, 1 / sqrt(width): larger ones amplify the rounding of
    # one order of a sum over another, on some processors to 1e-5.
    return tiny_source(
        deviation=0.18,
        num_hidden_layers=depth,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
    )


def tokens() -> dict[str, np.ndarray]:
    return {"tokens": np.random.default_rng(0).integers(0, 64, (BATCH, LENGTH + 1), np.int32)}


class Training:
    """A tiny network of a layout, placed on a mesh."""

    def __init__(self, layout: str, shape: tuple[int, int, int], **training: Any):
        is_new, trained = LAYOUTS[layout]
        origin = source(len(is_new))
        self.config = read_model_config(origin.hf_config)
        self.training = TrainingConfig(batch_size=BATCH, loss_chunk_tokens=16, **training)
        self.mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
        names = select_trained(self.config, is_new, trained)
        self.segments = plan_segments(names.blocks)
        mask = trained_mask(self.config, self.segments, names.outer)
        settings = OptimizerConfig(warmup_steps=0, decay_fraction=0.0)
        self.schedule = learning_rate_schedule(settings, 10)
        self.optimizer = make_optimizer(settings, self.schedule)
        self.placement = place(self.config, self.segments, mask, self.optimizer, self.mesh)
        shardings = param_shardings(self.config, self.segments, self.mesh)
        self.trainable, self.frozen = (
            load_params(
                origin,
                self.config,
                self.segments,
                dtype=np.dtype(np.float32),
                shardings=shardings,
                wanted=wanted,
            )
            for wanted in (mask, invert_mask(mask))
        )
        rows = local_rows(self.placement.rows, BATCH)
        self.batch = put_rows(tokens(), rows, BATCH, self.placement.rows)

    def loss_and_gradients(self) -> Any:
        compiled = jax.jit(
            functools.partial(
                mean_loss_and_gradients,
                config=self.config,
                training=self.training,
                shardings=self.placement.trainable,
            ),
            out_shardings=(self.placement.scalar, self.placement.trainable),
        )
        with jax.set_mesh(self.mesh):
            return compiled(self.trainable, self.frozen, self.batch)

    def compiled_step(self) -> str:
        step = make_train_step(
            self.config, self.training, self.optimizer, self.schedule, self.placement
        )
        with jax.set_mesh(self.mesh):
            state = initial_state(self.trainable, self.optimizer, self.placement)
            return step.lower(state, self.frozen, self.batch).compile().as_text()  # pyright: ignore


@functools.cache
def on_one_device(layout: str) -> Any:
    return jax.device_get(Training(layout, (1, 1, 1)).loss_and_gradients())


def assert_same(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)

    def compare(path: Any, a: jax.Array, b: np.ndarray) -> None:
        scale = np.max(np.abs(b))
        assert scale > 0, jax.tree_util.keystr(path)
        np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=1e-5 * scale, err_msg=str(path))

    jax.tree_util.tree_map_with_path(compare, actual[1], expected[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_are_those_of_one_device(layout: str, shape: tuple[int, int, int]):
    training = Training(layout, shape)
    actual = training.loss_and_gradients()
    for gradient, sharding in zip(
        jax.tree.leaves(actual[1]), jax.tree.leaves(training.placement.trainable), strict=True
    ):
        assert gradient.sharding.is_equivalent_to(sharding, gradient.ndim)
    assert_same(actual, on_one_device(layout))


def test_accumulated_parts_are_spread_too():
    assert_same(
        Training("top", (2, 2, 2), accumulation_steps=2).loss_and_gradients(), on_one_device("top")
    )


def shapes_of(hlo: str, operation: str) -> list[tuple[int, ...]]:
    """Shapes of all results of an operation, those in tuples included."""
    found = []
    for line in hlo.splitlines():
        if match := re.search(rf"= (.*?) {operation}(-start)?\(", line):
            found += [
                tuple(int(size) for size in shape.split(",") if size)
                for shape in re.findall(r"\w+\[([\d,]*)\]", match[1])
            ]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_no_whole_stack_is_gathered_and_no_gradient_replicated(
    layout: str, shape: tuple[int, int, int]
):
    training = Training(layout, shape)
    hlo = training.compiled_step()
    gathered = shapes_of(hlo, "all-gather")
    assert gathered, "kernels that are cut by width must be gathered"
    kernels = {
        name: spec for name, spec in block_specs(training.config).items() if "kernel" in name
    }
    repeats = {segment.repeats for segment in training.segments} - {1}
    assert repeats
    _, fsdp, tensor = shape
    for spec in kernels.values():
        # As each device would hold it, gathered along width.
        cut = tuple(
            size // (tensor if axis != "width" else 1)
            for axis, size in zip(spec.logical_axes, spec.shape, strict=True)
        )
        for count in repeats:
            assert (count, *cut) not in gathered
            assert (count, *spec.shape) not in gathered
    # What a device holds of gradients and moments is its part.
    reduced = shapes_of(hlo, "all-reduce") + shapes_of(hlo, "reduce-scatter")
    for spec in kernels.values():
        for count in repeats:
            assert (count, *spec.shape) not in reduced
