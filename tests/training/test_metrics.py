import json
import re
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from opt_deus_jax.distributed.device_facts import peak_flops
from opt_deus_jax.errors import UserError
from opt_deus_jax.training.metrics import (
    StepMonitor,
    layer_norms,
    memory_metrics,
    open_metrics,
    profiler,
    read_metrics,
    speed_metrics,
)

RECORDS = np.array([7, 3])


def random_tree(draw: np.random.Generator) -> dict[str, Any]:
    """Six layers: a frozen one, (trained, frozen) twice, and one trained in part."""

    def leaf(*shape: int) -> jax.Array:
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    frozen = {"kernel": None, "norm": None}
    pattern = [{"kernel": leaf(2, 4, 8), "norm": leaf(2, 8)}, frozen]
    partial = {"kernel": None, "norm": leaf(1, 8)}
    return {"embedding": leaf(5, 8), "segments": [[frozen], pattern, [partial]]}


def expected_norms(tree: dict[str, Any]) -> list[float]:
    block, partial = tree["segments"][1][0], tree["segments"][2][0]
    by_layer = [[block["kernel"][row], block["norm"][row]] for row in (0, 1)] + [[partial["norm"]]]
    return [float(np.linalg.norm(np.concatenate([np.ravel(x) for x in b]))) for b in by_layer]


def test_norms_are_those_of_the_trained_layers_from_the_bottom_up():
    tree = random_tree(np.random.default_rng(0))
    np.testing.assert_allclose(jax.jit(layer_norms)(tree), expected_norms(tree), rtol=1e-6)
    assert layer_norms({"embedding": jnp.ones(3), "segments": [[{"norm": None}]]}).shape == (0,)


def test_layers_of_one_segment_alternate_in_depth():
    pattern = [{"norm": jnp.array([[1.0], [3.0]])}, {"norm": jnp.array([[2.0], [4.0]])}]
    np.testing.assert_array_equal(layer_norms({"segments": [pattern]}), [1, 2, 3, 4])


def test_norms_of_leaves_that_are_cut_are_the_same_and_collect_no_leaf():
    tree = random_tree(np.random.default_rng(1))
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    def cut(leaf: jax.Array) -> jax.Array:
        axes = (*(None,) * (leaf.ndim - 1), "fsdp")
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

    spread = jax.tree.map(cut, tree)
    replicated = NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(layer_norms, out_shardings=replicated).lower(spread).compile()
    np.testing.assert_allclose(compiled(spread), expected_norms(tree), rtol=1e-6)
    text = compiled.as_text()
    assert text is not None
    assert "all-gather" not in text
    assert "all-reduce" in text


def device(kind: str) -> Any:
    return types.SimpleNamespace(device_kind=kind)


def speed_of(devices: list[Any]) -> dict[str, float]:
    return speed_metrics(
        [1.0, 2.0, 6.0],
        tokens_per_step=300,
        model_flops_per_step=10**15,
        devices=devices,
    )


def test_speed_is_over_all_steps_and_its_step_is_the_median_one():
    speed = speed_of([device("NVIDIA H200")] * 4)
    assert speed == {
        "step_seconds": 2.0,
        "tokens_per_second": pytest.approx(100),
        "tokens_per_second_per_device": pytest.approx(25),
        "model_flops_per_second": pytest.approx(1e15 / 3),
        "model_flops_utilisation": pytest.approx(1e15 / 3 / (4 * 989.5e12)),
    }


def test_a_cpu_tells_neither_utilisation_nor_memory():
    assert "model_flops_utilisation" not in speed_of(jax.devices())
    assert memory_metrics(jax.devices()) == {}


@pytest.mark.parametrize(
    ("kind", "tera_flops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.5),
        ("NVIDIA B200", 2250),
    ],
)
def test_the_peak_of_a_device_is_found_by_its_name(kind: str, tera_flops: float):
    assert peak_flops(kind) == tera_flops * 1e12


def test_the_peak_of_another_device_is_unknown():
    assert peak_flops(jax.devices()[0].device_kind) is None
    assert peak_flops("NVIDIA GeForce RTX 4090") is None


def run_steps(workdir: Path, steps: range, *, log_every: int = 1, **metrics: Any) -> None:
    with open_metrics(workdir, steps.start - 1, is_writer=True) as write, tqdm(disable=True) as bar:
        monitor = StepMonitor(
            write,
            bar,
            tokens_per_step=300,
            model_flops_per_step=600,
            trained_depths=(2, 5),
            devices=jax.devices(),
            log_every=log_every,
            latest_checkpoint=lambda: 4,
            is_writer=True,
        )
        for step in steps:
            loss = {"loss": jnp.float32(step), "grad_norm": jnp.float32(1)}
            monitor.observe(step, RECORDS, loss | metrics)
        monitor.flush()


def test_lines_hold_speeds_and_the_norm_of_each_trained_layer(tmp_path: Path):
    run_steps(tmp_path, range(1, 5), log_every=2, param_norm=jnp.array([0.25, 8.0]))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    speeds = {"step_seconds", "tokens_per_second", "tokens_per_second_per_device"}
    speeds |= {"model_flops_per_second"}
    norms = {"param_norm/2": 0.25, "param_norm/5": 8.0}
    for line in lines:
        assert line.keys() == {"step", "loss", "grad_norm", *speeds, *norms}
        assert {name: line[name] for name in norms} == norms
        assert line["tokens_per_second_per_device"] == pytest.approx(line["tokens_per_second"] / 8)
        assert line["model_flops_per_second"] == pytest.approx(2 * line["tokens_per_second"])
        assert line["step_seconds"] > 0
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"param_norm/5" in events.read_bytes()


def test_lines_of_later_steps_and_half_lines_are_dropped(tmp_path: Path):
    run_steps(tmp_path, range(1, 5))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    run_steps(tmp_path, range(3, 5))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_a_process_that_does_not_write_touches_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    with open_metrics(tmp_path / "w", -1, is_writer=False) as write, tqdm(disable=True) as bar:
        monitor = StepMonitor(
            write,
            bar,
            tokens_per_step=1,
            model_flops_per_step=1,
            trained_depths=(),
            devices=jax.devices(),
            log_every=1,
            latest_checkpoint=lambda: None,
            is_writer=False,
        )
        monitor.observe(1, RECORDS, {"loss": jnp.float32(1), "grad_norm": jnp.float32(1)})
        monitor.flush()
        monitor.report_held_out(1, 2.0)
    assert not (tmp_path / "w").exists()
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stops_with_step_records_and_checkpoint(
    tmp_path: Path, name: str, value: float
):
    message = re.escape(
        f"training stopped: {name} is {value} at step 5, on records [7, 3]; last good checkpoint: "
        "step 4;"
    )
    with pytest.raises(UserError, match=message):
        run_steps(tmp_path, range(5, 6), **{name: jnp.float32(value)})
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def traced(workdir: Path) -> list[Path]:
    return list((workdir / "profile").rglob("*.xplane.pb"))


def test_a_profile_holds_the_steps_that_were_asked_for(tmp_path: Path):
    seen = {}
    step_function = jax.jit(lambda x: jnp.tanh(x @ x))
    x = step_function(jnp.ones((64, 64)))
    with profiler(tmp_path, range(2, 4)) as before_step:
        for step in range(1, 6):
            before_step(step, x)
            seen[step] = len(traced(tmp_path))
            with jax.profiler.TraceAnnotation(f"step {step}"):
                x = step_function(x)
    assert seen == {1: 0, 2: 0, 3: 0, 4: 1, 5: 1}
    (trace,) = traced(tmp_path)
    events = {
        event.name
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
    }
    assert {f"step {step}" for step in range(6)} & events == {"step 2", "step 3"}


def test_a_profile_ends_with_the_training_and_nothing_asked_leaves_nothing(tmp_path: Path):
    with profiler(tmp_path / "none", range(0)) as before_step:
        before_step(1, None)
    assert not (tmp_path / "none").exists()
    with profiler(tmp_path, range(1, 9)) as before_step:
        before_step(1, jnp.ones(2))
    assert len(traced(tmp_path)) == 1
