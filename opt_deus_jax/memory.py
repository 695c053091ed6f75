"""How much memory this process may still take."""

from collections.abc import Iterator
from pathlib import Path

import psutil

_GROUPS = Path("/sys/fs/cgroup")


def _limit_files(listed: str) -> Iterator[tuple[Path, str, str]]:
    """Folder, limit and usage file of the groups that a /proc/self/cgroup lists, and of theirs."""
    for line in listed.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _GROUPS / "memory" if controllers else _GROUPS
        limit, usage = "memory.max", "memory.current"
        if controllers:
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        group = root / path.strip("/")
        # Inside a container the path may be that of the host.
        for folder in (group, *group.parents):
            if folder.is_relative_to(root) and (folder / limit).exists():
                yield folder, limit, usage


def _reclaimable(folder: Path) -> int:
    """Bytes of files that are counted as the group's, but given back when memory runs short."""
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def available_memory(listed: str | None = None) -> int:
    """Bytes that are free: of the machine, and of the control groups that this process is in.

    Args:
        listed: The content of /proc/self/cgroup; None reads it.

    Returns:
        The least of all.
    """
    available = psutil.virtual_memory().available
    path = Path("/proc/self/cgroup")
    if listed is None:
        listed = path.read_text() if path.exists() else ""
    for folder, limit_name, usage_name in _limit_files(listed):
        limit = (folder / limit_name).read_text().strip()
        if limit != "max":
            used = int((folder / usage_name).read_text()) - _reclaimable(folder)
            available = min(available, int(limit) - used)
    return available
