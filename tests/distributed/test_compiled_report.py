import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from configs.llama3 import get_config
from opt_deus_jax.checkpoints.opening import read_config_only
from opt_deus_jax.distributed.compiled_report import (
    argument_bytes,
    chip_memory,
    compile_for,
    roofline,
)
from opt_deus_jax.distributed.hlo_costs import Collective, HloCosts, count_hlo
from opt_deus_jax.distributed.hlo_text import parse_hlo
from opt_deus_jax.distributed.sharding import named_sharding
from opt_deus_jax.distributed.topology import CHIPS, parse_topology, topology_devices
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.accounting import count_costs
from opt_deus_jax.models.attention import causal_attention
from opt_deus_jax.models.moe import Routing, apply_experts
from opt_deus_jax.training.ahead import lower_train_step
from opt_deus_jax.training.segments import select_trained
from opt_deus_jax.upscaling.methods import plan_layers
from tests.training.tiny import tiny_hf_config

_ROOT = Path(__file__).parents[2]
_GIB = 2**30


def _costs(compiled: jax.stages.Compiled) -> HloCosts:
    return count_hlo(parse_hlo(compiled.as_text() or ""))


def _mesh(devices: Any, sizes: tuple[int, int, int]) -> jax.sharding.Mesh:
    axes = ("data", "fsdp", "tensor")
    return jax.make_mesh(sizes, axes, (AxisType.Auto,) * 3, devices=devices)


def test_without_loops_flops_and_bytes_are_those_of_xla() -> None:
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((48, 64), (64, 80))]
    compiled = jax.jit(lambda x, y: x @ y).lower(*shapes).compile()
    costs = _costs(compiled)
    expected: Any = compiled.cost_analysis()
    assert costs.flops == expected["flops"] == 2 * 48 * 64 * 80
    assert costs.hbm_bytes == expected["bytes accessed"] == 4 * (48 * 64 + 64 * 80 + 48 * 80)
    assert costs.collectives == {}
    assert costs.uncounted_kernels == ()


def test_loops_count_as_often_as_they_turn() -> None:
    def run(x, kernels):  # 7 turns of 1 product and of an inner loop of 3 products
        def outer(x, kernel):
            x = x @ kernel
            return jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ kernel), x), None

        return jax.lax.scan(outer, x, kernels)[0]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 32), (7, 32, 32))]
    compiled = jax.jit(run).lower(*shapes).compile()
    costs = _costs(compiled)
    one_turn: Any = compiled.cost_analysis()
    assert costs.flops == 7 * 4 * 2 * 16 * 32 * 32
    # A turn reads its own kernel from the stack, not the whole stack.
    assert costs.hbm_bytes > 7 * 4 * 4 * 32 * 32
    assert costs.hbm_bytes < 7 * 4 * one_turn["bytes accessed"]


def test_collectives_are_counted_by_kind() -> None:
    mesh = _mesh(jax.devices()[:8], (1, 4, 2))
    spec = PartitionSpec("fsdp", None)

    def local(x):
        def turn(x, _):
            gathered = jax.lax.all_gather(x, "fsdp", tiled=True)
            scattered = jax.lax.psum_scatter(gathered, "fsdp", tiled=True)
            moved = jax.lax.ppermute(scattered, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
            swapped = jax.lax.all_to_all(moved, "tensor", 0, 0, tiled=True)
            return jnp.sin(swapped) + jax.lax.psum(x, "fsdp"), None

        return jax.lax.scan(turn, x, None, length=5)[0]

    mapped = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=NamedSharding(mesh, spec))
    held = 64 * 8 * 4 // 4
    assert _costs(jax.jit(mapped).lower(x).compile()).collectives == {
        "all-gather": Collective(5, 5 * 3 * held),
        "reduce-scatter": Collective(5, 5 * 3 * held),
        "collective-permute": Collective(5, 5 * held),
        "all-to-all": Collective(5, 5 * held // 2),
        "all-reduce": Collective(5, 5 * 2 * held * 3 // 4),
    }


def test_the_roofline_is_the_slowest_resource() -> None:
    collectives = {"all-gather": Collective(1, 3 * 10**9), "all-reduce": Collective(2, 10**9)}
    times = roofline(HloCosts(197 * 10**12, 819 * 10**7, collectives, ()), CHIPS["v5e"])
    assert (times.compute, times.memory) == pytest.approx((1.0, 0.01))
    assert times.network == pytest.approx(4e9 / CHIPS["v5e"].ici_bytes_per_second)
    assert times.step == times.compute


def test_a_tpu_program_is_counted() -> None:
    pytest.importorskip("libtpu")
    topology = parse_topology("v5e:2x2")
    mesh = _mesh(topology_devices(topology), (1, 4, 1))
    rows, stack = PartitionSpec("fsdp"), PartitionSpec(None, "fsdp")

    def loss(kernels, x):
        def turn(x, kernel):
            kernel = jax.lax.with_sharding_constraint(kernel, PartitionSpec())
            scores = jnp.einsum("btd,bsd->bts", x, x)
            return jnp.einsum("bts,bsd->btd", jnp.tanh(scores), x @ kernel), None

        return jax.lax.scan(jax.checkpoint(turn), x, kernels)[0].astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        placed = [NamedSharding(mesh, spec) for spec in (stack, rows)]
        shapes = ((6, 256, 256), (32, 128, 256))
        arguments = [
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
            for shape, sharding in zip(shapes, placed, strict=True)
        ]
        compiled = compile_for(
            jax.jit(jax.grad(loss), out_shardings=placed[0]).lower(*arguments),
            topology,
            argument_bytes(arguments),
        )
    costs = _costs(compiled)
    batch, kernel, scores = 8, 2 * 128 * 256 * 256, 2 * 128 * 128 * 256
    # Forward: one product with the kernel and two of attention. Backward, in each turn: the scores
    # and the product with the kernel again, both gradients of all three products.
    assert costs.flops == 6 * batch * ((1 + 1 + 2) * kernel + (2 + 1 + 4) * scores)
    # The kernel is gathered in both directions, its gradient goes back to the cut.
    one_kernel = 256 * 256 * 2 * 3 // 4
    assert costs.collectives == {
        "all-gather": Collective(2 * 6, 2 * 6 * one_kernel),
        "reduce-scatter": Collective(6, 6 * one_kernel),
    }
    memory = chip_memory(compiled)
    assert argument_bytes(arguments) <= memory.arguments <= argument_bytes(arguments) + 65536
    assert memory.total < parse_topology("v5e:2x2").chip.hbm_bytes


def test_splash_attention_counts_its_causal_half() -> None:
    pytest.importorskip("libtpu")
    mesh = _mesh(topology_devices(parse_topology("v5e:2x2")), (1, 2, 2))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp", None, "tensor"))

    def loss(*arrays):
        query, key, value = arrays
        return causal_attention(query, key, value, None, "splash").astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        arrays = [
            jax.ShapeDtypeStruct((4, 1024, heads, 64), jnp.bfloat16, sharding=sharding)
            for heads in (4, 2, 2)
        ]
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile()
    costs = _costs(compiled)
    # 2 products forward, 3 + 4 backward; 3 of the 4 blocks of 512 x 512 touch the causal half.
    assert costs.flops == 2 * (2 + 3 + 4) * (2 * 2) * (3 * 512 * 512) * 64
    assert costs.uncounted_kernels == ()


# The second makes a number of rows that XLA would not group.
@pytest.mark.parametrize("tokens", [2048, 2044])
def test_grouped_experts_multiply_each_row_once(tokens: int) -> None:
    pytest.importorskip("libtpu")
    width, inner, number, per_token = 256, 512, 8, 2
    mesh = _mesh(topology_devices(parse_topology("v5e:2x2")), (1, 2, 2))

    def shaped(shape: tuple[int, ...], dtype: Any, *axes: str) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, *axes))

    def loss(x_MD, block, routing):
        made_MD = apply_experts(x_MD, routing, block, jax.nn.silu, "grouped")
        return jnp.sum(made_MD.astype(jnp.float32) ** 2)

    rows = ("expert", "expert_mlp", "width")
    block = {
        "experts_gate_kernel": shaped((number, inner, width), jnp.bfloat16, *rows),
        "experts_up_kernel": shaped((number, inner, width), jnp.bfloat16, *rows),
        "experts_down_kernel": shaped(
            (number, width, inner), jnp.bfloat16, "expert", "width", "expert_mlp"
        ),
    }
    routing = Routing(
        shaped((tokens, per_token), jnp.float32, "batch", "length"),
        shaped((tokens, per_token), jnp.int32, "batch", "length"),
        shaped((tokens, number), jnp.float32, "batch", "all_experts"),
    )
    x_MD = shaped((tokens, width), jnp.bfloat16, "batch", "gathered_width")
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x_MD, block, routing).compile()
    costs = _costs(compiled)
    # Three kernels: forward, back to the rows, and each kernel's own gradient. Every device has
    # half of the tokens, which come to 2048 rows, padding included.
    assert costs.flops == 3 * 3 * 2 * 2048 * width * inner
    assert costs.uncounted_kernels == ()


def test_a_program_that_xla_cannot_fit_is_refused_with_the_bytes_missing() -> None:
    pytest.importorskip("libtpu")
    topology = parse_topology("v5e:2x2")
    mesh = _mesh(topology_devices(topology), (1, 4, 1))
    sharding = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((10, 1024, 1024, 1024), jnp.bfloat16, sharding=sharding)
    lowered = jax.jit(lambda x: jnp.sin(x) @ x).lower(x)
    with pytest.raises(UserError, match="v5e:2x2: the training step does not fit") as caught:
        compile_for(lowered, topology, argument_bytes([x]))
    missing = re.search(r"needs ([\d,]+) bytes more a chip", str(caught.value))
    assert missing is not None
    # Arguments of 20 GiB and at least as much again for the result.
    assert int(missing[1].replace(",", "")) >= (20 + 20 - 15.75) * _GIB


@pytest.mark.parametrize(
    ("variant", "name"),
    [("1b_shape_v5e", "v5e:4x4"), ("8b_shape_v5p", "v5p:2x4x4"), ("8b_shape_v6e", "v6e:8x8")],
)
def test_the_recommended_settings_suit_their_slice(variant: str, name: str) -> None:
    pytest.importorskip("libtpu")
    topology = parse_topology(name)
    experiment = get_config(variant)
    _, model = read_config_only(experiment.base)
    is_new = [layer.is_new for layer in plan_layers(experiment.upscale, model.num_layers, None)]
    trained = select_trained(model, is_new, "new")
    step = lower_train_step(experiment, model, trained, topology_devices(topology))
    assert step.tokens == 64 * 2048
    # bfloat16 where frozen, float32 with both moments where trained; every axis is cut by width.
    costs = count_costs(model, trained.outer, trained.blocks, sequence_length=2048, frozen_bytes=2)
    gradients = 4 * costs.trained_parameters
    cut = experiment.mesh.fsdp if experiment.mesh.fsdp > 0 else topology.num_chips
    held = (costs.training_bytes - gradients) / cut
    assert argument_bytes(step.arguments) == pytest.approx(held, rel=0.01)


def _launch(tmp_path: Path, *arguments: str, **changes: Any) -> subprocess.CompletedProcess[str]:
    base = tmp_path / "shape.json"
    base.write_text(json.dumps(tiny_hf_config(**changes)))
    return subprocess.run(
        [
            *(sys.executable, "-m", "experiments.compile_ahead"),
            *("--config=tests/entry/tiny_config.py", f"--config.base={base}", *arguments),
            *("--config.training.compute_dtype=bfloat16", "--config.training.batch_size=8"),
        ],
        cwd=_ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_launcher_reports_the_real_step(tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    output = tmp_path / "report.json"
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.training.attention=splash")
    result = _launch(tmp_path, "--topology=v5e:2x2", f"--output={output}", *mesh)
    assert result.returncode == 0, result.stderr
    assert "model FLOPs utilisation, at most" in result.stdout
    report = json.loads(output.read_text())
    assert report["num_chips"] == 4
    assert report["missing_bytes"] == 0
    assert report["tokens"] == 8 * 16
    assert report["costs"]["uncounted_kernels"] == []
    memory = report["memory"]
    assert report["total_bytes"] == (
        sum(memory[name] for name in ("arguments", "outputs", "temporaries", "code"))
        - memory["aliased"]
    )
    # The state is donated: what comes back takes its place.
    assert memory["aliased"] > 0.9 * memory["outputs"]


def test_the_launcher_refuses_a_step_that_is_too_large(tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    wide = {"hidden_size": 16384, "intermediate_size": 131072, "num_hidden_layers": 16}
    result = _launch(tmp_path, "--topology=v5e:2x2", **wide)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert re.search(r"^error: .*does not fit: it needs [\d,]+ bytes more a chip", lines[-1])
