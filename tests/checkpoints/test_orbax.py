import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from opt_deus_jax.checkpoints import orbax
from opt_deus_jax.checkpoints.checksum import tree_checksums
from opt_deus_jax.checkpoints.saved_step import NOT_READ, find_step, load_some
from opt_deus_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
# Of the stacked kernels: wide enough that Orbax keeps them in files of their own.
SHAPE = (2, 16, 24)


class Place:
    """Stands for a data iterator."""

    def __init__(self, taken: int = 0):
        self.taken = taken

    def get_state(self) -> dict[str, int]:
        return {"next_index": self.taken}

    def set_state(self, state: dict[str, int]) -> None:
        self.taken = state["next_index"]


def trees_of(step: int) -> dict[str, Any]:
    """Random arrays, as numpy's, in a structure like that of a training."""
    draw = np.random.default_rng(step)

    def kernels() -> np.ndarray:
        return draw.normal(size=SHAPE).astype(np.float32)

    return {
        "trainable": {
            "norm": np.ones(24, np.float32) * step,
            "head": None,
            "segments": [[kernels(), None]],
        },
        "optimizer_state": (np.int32(step), {"mu": [kernels().astype(jnp.bfloat16)]}),
    }


def on(mesh_shape: tuple[int, int, int] | None) -> Callable[[Any], Any]:
    """Gives every leaf a sharding: over some of the 8 devices, or on the first."""
    if mesh_shape is None:
        return lambda leaf: SingleDeviceSharding(jax.devices()[0])
    devices = jax.devices()[: int(np.prod(mesh_shape))]
    mesh = jax.make_mesh(mesh_shape, AXES, (AxisType.Auto,) * 3, devices=devices)
    whole, cut = PartitionSpec(), PartitionSpec(None, "tensor", "fsdp")
    return lambda leaf: NamedSharding(mesh, cut if np.ndim(leaf) == 3 else whole)


def put(trees: Any, mesh_shape: tuple[int, int, int] | None = None) -> Any:
    sharding = on(mesh_shape)
    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding(leaf)), trees)


def opened(workdir: Path, keep: int = 2) -> orbax.Checkpointer:
    return orbax.open_checkpointer(workdir / "checkpoints", save_every=1, last_step=99, keep=keep)


def save_steps(
    workdir: Path,
    losses: dict[int, float | None],
    mesh_shape: tuple[int, int, int] | None = None,
    keep: int = 2,
) -> None:
    with opened(workdir, keep) as checkpointer:
        for step, loss in losses.items():
            trees = put(trees_of(step), mesh_shape)
            orbax.save(checkpointer, step, trees, Place(step), {"of": (step, "x")}, loss)


def restore(
    workdir: Path, mesh_shape: tuple[int, int, int] | None = None
) -> tuple[orbax.Restored | None, Place]:
    place = Place()
    with opened(workdir) as checkpointer:
        found = orbax.restore(checkpointer, put(trees_of(0), mesh_shape), place, lambda _: None)
        if found is not None:
            assert orbax.latest_step(checkpointer) == found.step
    return found, place


def assert_restored(found: orbax.Restored | None, place: Place, step: int) -> None:
    assert found is not None
    assert (found.step, place.taken, found.metadata) == (step, step, {"of": [step, "x"]})
    expected = trees_of(step)
    assert jax.tree.structure(found.trees) == jax.tree.structure(expected)
    for read, saved in zip(jax.tree.leaves(found.trees), jax.tree.leaves(expected), strict=True):
        assert read.dtype == saved.dtype
        assert np.asarray(read).tobytes() == saved.tobytes()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("two_steps")
    save_steps(workdir, {1: 0.5, 2: 0.25}, (2, 2, 2))
    return workdir


def copy_of(workdir: Path, target: Path) -> Path:
    shutil.copytree(workdir, target, dirs_exist_ok=True)
    return target


@pytest.mark.parametrize("mesh_shape", [(2, 2, 2), (8, 1, 1), (1, 1, 4), (1, 8, 1), None])
def test_a_step_is_restored_bit_for_bit_onto_any_mesh(
    two_steps: Path, mesh_shape: tuple[int, int, int] | None
):
    found, place = restore(two_steps, mesh_shape)
    assert_restored(found, place, 2)
    assert found is not None
    sharding = on(mesh_shape)
    for leaf in jax.tree.leaves(found.trees):
        assert leaf.sharding.is_equivalent_to(sharding(leaf), leaf.ndim)


def test_the_latest_and_the_best_are_kept(tmp_path: Path):
    nan = float("nan")
    save_steps(tmp_path, {1: None, 2: 0.5, 3: 0.3, 4: 0.3, 5: nan, 6: 0.4, 7: None})
    # Opened again, Orbax knows the losses from its files alone.
    with opened(tmp_path) as checkpointer:
        assert [c.step for c in checkpointer.checkpoints] == [4, 6, 7]
        assert (orbax.latest_step(checkpointer), orbax.best_step(checkpointer)) == (7, 4)
        orbax.save(checkpointer, 8, put(trees_of(8)), Place(8), {}, None)
        checkpointer.wait()
        assert [c.step for c in checkpointer.checkpoints] == [4, 7, 8]
        orbax.save(checkpointer, 9, put(trees_of(9)), Place(9), {}, 0.1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["8", "9"]


def test_there_may_be_no_best_and_no_checkpoint(tmp_path: Path):
    assert restore(tmp_path)[0] is None
    save_steps(tmp_path, {1: None, 2: None, 3: None})
    with opened(tmp_path) as checkpointer:
        assert orbax.best_step(checkpointer) is None
        assert [c.step for c in checkpointer.checkpoints] == [2, 3]


def test_what_is_saved_may_be_donated_at_once(tmp_path: Path):
    trees = put(trees_of(1), (2, 2, 2))
    with opened(tmp_path) as checkpointer:
        orbax.save(checkpointer, 1, trees, Place(1), {"of": [1, "x"]}, None)
        jax.block_until_ready(
            jax.jit(lambda t: jax.tree.map(jnp.zeros_like, t), donate_argnums=0)(trees)
        )
    assert_restored(*restore(tmp_path), step=1)


def damage(file: Path, bit: int | None, length: int) -> None:
    content = bytearray(file.read_bytes()[:length])
    if bit is not None:
        content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def test_damage_anywhere_is_found_or_harmless(
    two_steps: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    draw = random.Random(0)
    newest = two_steps / "checkpoints" / "2"
    files = sorted(path.relative_to(two_steps) for path in newest.rglob("*") if path.is_file())
    assert len(files) > 10
    found_in = set()
    for name in files:
        size = (two_steps / name).stat().st_size
        # The marks that a write has ended say nothing else.
        flips = 1 if name.name == "commit_success.txt" else 3
        cases = [(None, size // 2), *((draw.randrange(8 * size), size) for _ in range(flips))]
        for number, (bit, length) in enumerate(cases):
            workdir = copy_of(two_steps, tmp_path / f"{number}_{'_'.join(name.parts)}")
            damage(workdir / name, bit, length)
            found, place = restore(workdir)
            assert found is not None
            assert_restored(found, place, found.step)
            lines = capfd.readouterr().err.splitlines()
            aside = workdir / "damaged_checkpoints" / "2"
            assert aside.exists() == (found.step == 1) == bool(lines)
            if lines:
                assert len(lines) == 1
                assert lines[0].startswith(f"{workdir / 'checkpoints' / '2'}: this checkpoint is d")
                assert lines[0].endswith(f"it is now {aside}")
                found_in.add(name.relative_to("checkpoints/2").parts[0])
            shutil.rmtree(workdir)
    # Every item, and the metadata of the whole.
    items = {"trainable", "optimizer_state", "data", "metadata", "metrics", "_CHECKPOINT_METADATA"}
    assert found_in == items


def test_a_flip_that_orbax_reads_without_complaint_is_found(two_steps: Path, tmp_path: Path):
    """Here the arrays are whole, but they are not those that were saved."""
    workdir = copy_of(two_steps, tmp_path)
    trees = trees_of(2)
    trees["trainable"]["segments"][0][0].view(np.uint32)[1, 3, 5] ^= 1
    with opened(tmp_path / "other") as other:
        orbax.save(other, 2, put(trees, (2, 2, 2)), Place(2), {"of": (2, "x")}, 0.25)
    target = workdir / "checkpoints" / "2" / "trainable"
    shutil.rmtree(target)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "2" / "trainable", target)
    with pytest.raises(UserError, match=r"2: this checkpoint is damaged \(the checksum of \['trai"):
        load_some(
            find_step(workdir / "checkpoints", "2"),
            {"trainable": jax.tree.map(lambda x: x, put(trees_of(0))["trainable"])},
        )
    assert_restored(*restore(workdir), step=1)


def test_a_damaged_step_can_be_saved_and_damaged_again(two_steps: Path, tmp_path: Path):
    workdir = copy_of(two_steps, tmp_path)
    for number in ("2", "2_2"):
        damage(workdir / "checkpoints" / "2" / "data" / "data.json", None, 3)
        assert_restored(*restore(workdir), step=1)
        assert (workdir / "damaged_checkpoints" / number).is_dir()
        save_steps(workdir, {2: 0.25})
    assert_restored(*restore(workdir), step=2)


def test_a_removal_that_was_cut_short_is_finished(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    whole, workdir = tmp_path / "whole", tmp_path / "cut"
    save_steps(whole, {1: 0.5, 2: 0.3}, keep=9)
    save_steps(whole, {3: 0.4, 4: 0.6}, keep=9)
    checkpoints = copy_of(whole, workdir) / "checkpoints"
    for step in (1, 2):
        damage(checkpoints / str(step) / "data" / "data.json", None, 3)
    shutil.rmtree(checkpoints / "1" / "metadata")
    with pytest.raises(UserError, match=r"/2: this checkpoint is damaged"):
        find_step(checkpoints, "best")
    assert_restored(*restore(workdir), step=4)
    # Step 2 was to be kept, being the best: its damage is another's doing.
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{checkpoints / '2'}: this checkpoint is damaged")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["3", "4"]
    assert [path.name for path in (workdir / "damaged_checkpoints").iterdir()] == ["2"]

    (whole / "checkpoints" / "1" / "metadata" / "data.json").unlink()
    assert find_step(whole / "checkpoints", "best").step == 2
    assert_restored(*restore(whole), step=4)
    assert not (whole / "damaged_checkpoints").exists()
    assert not capfd.readouterr().err


@pytest.mark.parametrize("file", ["metadata/data.json", "trainable/manifest.ocdbt"])
def test_where_all_are_damaged_nothing_is_moved(two_steps: Path, tmp_path: Path, file: str):
    workdir = copy_of(two_steps, tmp_path)
    for step in ("1", "2"):
        damage(workdir / "checkpoints" / step / file, None, 9)
    for _ in range(2):
        with pytest.raises(UserError) as error:
            restore(workdir)
        message = str(error.value)
        assert message.startswith(f"{workdir / 'checkpoints'}: every checkpoint is damaged (")
        assert "\n" not in message
        assert "remove the folder to train from the start" in message
    assert not (workdir / "damaged_checkpoints").exists()
    assert len(list((workdir / "checkpoints").iterdir())) == 2


def test_a_checkpoint_of_something_else_stays(two_steps: Path, tmp_path: Path):
    workdir = copy_of(two_steps, tmp_path)
    state = put(trees_of(0))

    def refuse(saved: orbax.SavedStep) -> None:
        raise UserError(f"{saved.path}: of {saved.metadata['of'][0]}")

    with opened(workdir) as checkpointer, pytest.raises(UserError, match="2: of 2"):
        orbax.restore(checkpointer, state, Place(), refuse)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not (workdir / "damaged_checkpoints").exists()


def test_a_step_is_found_by_name(two_steps: Path, tmp_path: Path):
    folder = two_steps / "checkpoints"
    assert [find_step(folder, which).step for which in ("latest", "best", "1")] == [2, 2, 1]
    with pytest.raises(UserError, match="checkpoint=3: no such step; there are .* 1, 2, or use"):
        find_step(folder, "3")
    with pytest.raises(UserError, match=r"checkpoints: no checkpoint here: run experiments.train"):
        find_step(tmp_path / "checkpoints", "latest")
    save_steps(tmp_path, {1: None})
    with pytest.raises(UserError, match="checkpoint=best: none was saved with a held-out loss; "):
        find_step(tmp_path / "checkpoints", "best")
    damage(tmp_path / "checkpoints" / "1" / "metadata" / "data.json", 200, 10**6)
    with pytest.raises(UserError, match=r"1: this checkpoint is damaged \(.*; there are"):
        find_step(tmp_path / "checkpoints", "latest")


def test_single_arrays_are_read_alone(two_steps: Path):
    saved = find_step(two_steps / "checkpoints", "latest")
    wanted = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=on((1, 1, 4))(np.zeros(SHAPE)))
    abstract = {"norm": NOT_READ, "head": None, "segments": [[wanted, None]]}
    read = load_some(saved, {"trainable": abstract})["trainable"]
    assert read["norm"] is NOT_READ
    np.testing.assert_array_equal(
        read["segments"][0][0], trees_of(2)["trainable"]["segments"][0][0]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "float16", "uint8"])
def test_any_change_of_one_number_changes_the_checksum(dtype: str):
    draw = np.random.default_rng(0)
    array = draw.integers(0, 256, (3, 5, 7 * jnp.dtype(dtype).itemsize)).astype(np.uint8)
    array = array.view(jnp.dtype(dtype))
    (before,) = tree_checksums({"x": jnp.asarray(array)}).values()
    seen = {before}
    bits = array.reshape(-1).view(np.uint8)
    for bit in range(8 * bits.size):
        bits[bit // 8] ^= 1 << bit % 8
        seen |= set(tree_checksums({"x": jnp.asarray(array)}).values())
        bits[bit // 8] ^= 1 << bit % 8
    # No two flips are mistaken for each other either, save by a chance of about 1e-3 in all.
    assert len(seen) == 8 * bits.size + 1


def test_the_checksum_is_that_of_the_place_and_not_of_the_device():
    array = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    sums = [tree_checksums({"x": put(array, m)}) for m in ((2, 2, 2), (1, 4, 1), None)]
    assert sums[0] == sums[1] == sums[2]
    assert list(sums[0]) == ["['x']"]
    swapped = array.copy()
    swapped[0, 0, [0, 1]] = swapped[0, 0, [1, 0]]
    assert tree_checksums({"x": put(swapped)}) != sums[0]
    json.dumps(sums[0])
