"""What this machine offers to this process: cores, instruction sets, memory, disk.

Containers count: CPU affinity, and cgroup limits of processor time and memory, are taken into account.
Pure functions parse given text, so that other machines can be tested from fixtures; nothing runs at import.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

X86_LEVELS: tuple[tuple[str, frozenset[str]], ...] = (
    ("x86-64-v4", frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})),
    ("x86-64-v3", frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})),
    ("x86-64-v2", frozenset({"cx16", "popcnt", "sse4_1", "sse4_2", "ssse3"})),
)
REPORTED = frozenset(
    {
        "avx2",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "amx_int8",
        "avx_vnni",
        "asimd",
        "asimddp",
        "i8mm",
        "sve",
        "bf16",
    }
)


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """One machine as one process sees it. Memory in bytes; `cores` may be a fraction in a container."""

    cpu: str
    isa: str
    features: tuple[str, ...]
    physical_cores: int
    cores: float
    memory_total: int
    memory_available: int


def probe() -> Machine:
    """Look at this machine; a few milliseconds."""
    import psutil

    text = _text("/proc/cpuinfo")
    cpu, flags = parse_cpuinfo(text) if text else (platform.processor(), frozenset())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota = cpu_quota({name: _text(name) for name in CPU_QUOTA_FILES})
    physical = min(psutil.cpu_count(logical=False) or usable, usable)
    memory = psutil.virtual_memory()
    limit = memory_limit({name: _text(name) for name in MEMORY_LIMIT_FILES})
    return Machine(
        cpu=cpu or platform.machine(),
        isa=isa_level(platform.machine(), flags),
        features=tuple(sorted(flags & REPORTED)),
        physical_cores=max(1, min(physical, round(quota)) if quota else physical),
        cores=min(float(usable), quota) if quota else float(usable),
        memory_total=min(memory.total, limit) if limit else memory.total,
        memory_available=min(memory.available, limit) if limit else memory.available,
    )


def parse_cpuinfo(text: str) -> tuple[str, frozenset[str]]:
    """Name and feature flags of the first processor in /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name") or fields.get("Model") or "", frozenset(flags.split())


def isa_level(machine: str, flags: frozenset[str]) -> str:
    """The microarchitecture level of an x86-64 processor, or the architecture's name."""
    if machine not in ("x86_64", "AMD64"):
        return machine
    needed: frozenset[str] = frozenset()
    for _, more in X86_LEVELS:
        needed |= more
    for name, more in X86_LEVELS:
        if needed <= flags or not flags:
            return name if flags else "x86-64"
        needed -= more
    return "x86-64"


CPU_QUOTA_FILES = (
    "/sys/fs/cgroup/cpu.max",
    "/sys/fs/cgroup/cpu/cpu.cfs_quota_us",
    "/sys/fs/cgroup/cpu/cpu.cfs_period_us",
)
MEMORY_LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def cpu_quota(files: Mapping[str, str]) -> float | None:
    """Processors' worth of time that a cgroup (v2, else v1) allows; None without a limit."""
    quota, _, period = files.get(CPU_QUOTA_FILES[0], "").partition(" ")
    if not quota:
        quota, period = files.get(CPU_QUOTA_FILES[1], ""), files.get(CPU_QUOTA_FILES[2], "")
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None
    return share if share > 0 else None


def memory_limit(files: Mapping[str, str]) -> int | None:
    """Bytes of memory that a cgroup allows; None without a limit."""
    for name in MEMORY_LIMIT_FILES:
        text = files.get(name, "").strip()
        if text.isdecimal() and int(text) < 1 << 60:  # v1 writes "no limit" as a huge number
            return int(text)
    return None


MEMORY_USE_FILES = (
    "/sys/fs/cgroup/memory.current",
    "/sys/fs/cgroup/memory.stat",
    "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    "/sys/fs/cgroup/memory/memory.stat",
)


def memory_use(files: Mapping[str, str]) -> int:
    """Bytes that a cgroup (v2, else v1) holds and cannot simply drop: files not used lately are left out."""
    for current, stat in (MEMORY_USE_FILES[:2], MEMORY_USE_FILES[2:]):
        text = files.get(current, "").strip()
        if text.isdecimal():
            lines = (line.partition(" ") for line in files.get(stat, "").splitlines())
            fields = {name: value.strip() for name, _, value in lines}
            idle = fields.get("total_inactive_file") or fields.get("inactive_file") or ""
            return max(0, int(text) - (int(idle) if idle.isdecimal() else 0))
    return 0


def memory_left() -> int:
    """Bytes that may still be taken here: what the system has available, within the cgroup's limit."""
    import psutil

    available = int(psutil.virtual_memory().available)
    limit = memory_limit({name: _text(name) for name in MEMORY_LIMIT_FILES})
    if limit is None:
        return available
    return max(0, min(available, limit - memory_use({name: _text(name) for name in MEMORY_USE_FILES})))


def disk_free(path: Path) -> int:
    """Free bytes where `path` is or would be made."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def compilers() -> dict[str, str | None]:
    """Paths of the C and C++ compilers that building llama.cpp would use."""
    return {
        "C": next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None),
        "C++": next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None),
    }


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
