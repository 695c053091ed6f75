"""What control groups leave of the machine's memory."""

from types import SimpleNamespace

import psutil
import pytest

from opt_deus_jax import memory

FREE = 10**10


@pytest.fixture(autouse=True)
def _machine(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=FREE))


def group(folder, limit_name, limit, usage_name, usage, stat):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in ((limit_name, limit), (usage_name, usage), ("memory.stat", stat)):
        (folder / name).write_text(f"{value}\n")


def version_2(folder, limit, usage=0, cache=0):
    stat = f"anon 5\ninactive_file {cache}\nfile 7"
    group(folder, "memory.max", limit, "memory.current", usage, stat)


def version_1(folder, limit, usage=0, cache=0):
    stat = f"cache 5\ninactive_file 1\ntotal_inactive_file {cache}"
    group(folder, "memory.limit_in_bytes", limit, "memory.usage_in_bytes", usage, stat)


def test_without_groups_it_is_the_machines(tmp_path):
    assert memory.available_memory("") == FREE
    assert memory.available_memory("0::/user/me\n3:memory,cpu:/job") == FREE


@pytest.mark.parametrize(("make", "line"), [
    (version_2, "0::{}"),
    (version_1, "0::/\n7:cpu:/\n4:memory:{}"),
])  # fmt: skip
def test_a_limit_counts_without_what_can_be_given_back(tmp_path, make, line):
    root = tmp_path if make is version_2 else tmp_path / "memory"
    make(root / "jobs" / "mine", 5000, 3000, 1000)
    assert memory.available_memory(line.format("/jobs/mine")) == 5000 - 2000
    # A group above it may leave less.
    make(root / "jobs", 4000, 3500, 0)
    assert memory.available_memory(line.format("/jobs/mine")) == 500
    # In a container only the root of the group is seen, under the host's path.
    make(root, 300, 100, 0)
    assert memory.available_memory(line.format("/host/only")) == 200


def test_a_group_without_limit_leaves_all(tmp_path):
    version_2(tmp_path / "jobs", "max", 3000)
    assert memory.available_memory("0::/jobs") == FREE


def test_it_is_read_from_this_process(monkeypatch):
    monkeypatch.undo()
    assert 0 < memory.available_memory() <= psutil.virtual_memory().total
