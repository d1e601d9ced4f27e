"""What a container or a service may use: processor time and memory by Linux' control groups, v1 and v2.

A process lies in a group, and a limit anywhere between it and the root binds. In a container the own group
is the root of what is visible; outside one, `/proc/self/cgroup` names it.
Source: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/ of Linux.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from lichen.devices.sysfs import MAX_NUMBER, Files, number, read_text

ROOT = "/sys/fs/cgroup"
OWN = "/proc/self/cgroup"
MAX_DEPTH = 32  # groups between a process and the root

_V2_NAMES = ("cpu.max", "memory.max", "memory.current", "memory.stat")
_V1_NAMES = {
    "cpu": ("cpu.cfs_quota_us", "cpu.cfs_period_us"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
}


def read_groups(root: Path = Path("/")) -> dict[str, str]:
    """The files of this process's groups, up to the root, and `/proc/self/cgroup` itself."""
    own = read_text(root / OWN.lstrip("/")) or ""
    files = {OWN: own}
    for folder, names in _places(own):
        for name in names:
            path = f"{folder}/{name}"
            if (text := read_text(root / path.lstrip("/"))) is not None:
                files[path] = text
    return files


def cpu_quota(files: Files) -> float | None:
    """Processors' worth of time that the groups allow; None without a limit."""
    shares = []
    for folder, _ in _places(files.get(OWN, "")):
        quota, _, period = files.get(f"{folder}/cpu.max", "").partition(" ")
        if not quota:
            quota = files.get(f"{folder}/cpu.cfs_quota_us", "")
            period = files.get(f"{folder}/cpu.cfs_period_us", "")
        allowed, whole = number(quota.strip()), number(period.strip())
        if allowed and whole:
            shares.append(allowed / whole)
    return min(shares, default=None)


def memory_limit(files: Files) -> int | None:
    """Bytes of memory that the groups allow; None without a limit."""
    limits = [limit for _, limit in _memory_limits(files)]
    return min(limits, default=None)


def memory_left(files: Files) -> int | None:
    """Bytes that the groups still allow beyond what they hold for good; None without a limit."""
    left = [max(0, limit - _memory_use(files, folder)) for folder, limit in _memory_limits(files)]
    return min(left, default=None)


def memory_use(files: Files) -> int:
    """Bytes that the own group holds and cannot simply drop; 0 where nothing tells."""
    for folder, _ in _places(files.get(OWN, "")):
        if used := _memory_use(files, folder):
            return used
    return 0


def _memory_limits(files: Files) -> Iterator[tuple[str, int]]:
    for folder, _ in _places(files.get(OWN, "")):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = number(files.get(f"{folder}/{name}", "").strip())
            if limit and limit < MAX_NUMBER:  # v1 writes "no limit" as a huge number
                yield folder, limit


def _memory_use(files: Files, folder: str) -> int:
    """Of one group; files not used lately are left out, since they are dropped first."""
    for name in ("memory.current", "memory.usage_in_bytes"):
        used = number(files.get(f"{folder}/{name}", "").strip())
        if used is not None:
            lines = (line.partition(" ") for line in files.get(f"{folder}/memory.stat", "").splitlines())
            fields = {key: value.strip() for key, _, value in lines}
            idle = number(fields.get("total_inactive_file") or fields.get("inactive_file"))
            return max(0, used - (idle or 0))
    return 0


def _places(own: str) -> list[tuple[str, tuple[str, ...]]]:
    """Folders of the own groups and their parents, the own first, with the names of files to look for."""
    paths: dict[str, str] = {}  # controller ("" in v2) -> own group
    for line in own.splitlines()[:64]:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            paths.setdefault(controller, path)
    places: list[tuple[str, tuple[str, ...]]] = [
        (f"{ROOT}{parent}", _V2_NAMES) for parent in _upwards(paths.get("", "/"))
    ]
    for controller, names in _V1_NAMES.items():
        for parent in _upwards(paths.get(controller, "/")):
            places.append((f"{ROOT}/{controller}{parent}", names))
    return places


def _upwards(path: str) -> list[str]:
    """A group and all above it, without the last slash; only the root for a path that points elsewhere."""
    parts = PurePosixPath(path).parts
    if not parts or parts[0] != "/" or ".." in parts or "\0" in path or len(parts) > MAX_DEPTH:
        return [""]
    return ["/" * (end > 1) + "/".join(parts[1:end]) for end in range(len(parts), 0, -1)]
