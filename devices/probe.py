"""What this machine offers to this process: cores, instruction sets, memory, disk.

Containers count: CPU affinity, and cgroup limits of processor time and memory, are taken into account.
Pure functions parse given text, so that other machines can be tested from fixtures; nothing runs at import.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

import msgspec

from lichen.devices import cgroup, mac
from lichen.devices.cores import CORE_FILES, Cores, cores
from lichen.devices.sysfs import read_files

X86_LEVELS: tuple[tuple[str, frozenset[str]], ...] = (
    ("x86-64-v4", frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})),
    ("x86-64-v3", frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})),
    ("x86-64-v2", frozenset({"cx16", "popcnt", "sse4_1", "sse4_2", "ssse3"})),
)
REPORTED = frozenset(
    {
        "avx",
        "avx2",
        "bmi2",
        "f16c",
        "fma",
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
    """One machine as one process sees it. Memory in bytes; `cores` may be a fraction in a container.

    physical_cores: as far as processor time is allowed. threads: how many compute best in step, which is
    one a fast core; thrifty cores would make the others wait.
    """

    cpu: str
    isa: str
    features: tuple[str, ...]
    physical_cores: int
    threads: int
    cores: float
    memory_total: int
    memory_available: int


def probe() -> Machine:
    """Look at this machine; a few milliseconds."""
    import psutil

    cpu, flags, found = processor()
    groups = cgroup.read_groups()
    quota = cgroup.cpu_quota(groups)
    memory = psutil.virtual_memory()
    limit, left = cgroup.memory_limit(groups), cgroup.memory_left(groups)
    return Machine(
        cpu=cpu or platform.processor() or platform.machine(),
        isa=isa_level(platform.machine(), flags),
        features=tuple(sorted(flags & REPORTED)),
        physical_cores=within(found.physical, quota),
        threads=within(found.performance, quota),
        cores=min(float(found.threads), quota) if quota else float(found.threads),
        memory_total=min(memory.total, limit) if limit else memory.total,
        memory_available=memory.available if left is None else min(memory.available, left),
    )


def processor() -> tuple[str, frozenset[str], Cores]:
    """Name, feature flags and cores of the processor, before any limit on its time."""
    import psutil

    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    usable = frozenset(affinity)
    physical = min(psutil.cpu_count(logical=False) or len(usable), len(usable))
    if sys.platform == "darwin":
        text = mac.sysctl()
        fast, thrifty = mac.core_counts(text)
        found = Cores(
            physical=fast + thrifty or physical,
            performance=fast or physical,
            efficiency=thrifty,
            threads=len(usable),
        )
        return *mac.processor(text), found
    name, flags = parse_cpuinfo(_text("/proc/cpuinfo"))
    return name, flags, cores(read_files(CORE_FILES), usable, physical)


def within(count: int, quota: float | None) -> int:
    """So many cores, or as many as their time is allowed for; at least one."""
    return max(1, min(count, round(quota)) if quota else count)


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


def memory_left() -> int:
    """Bytes that may still be taken here: what the system has available, within the cgroup's limit."""
    import psutil

    available = int(psutil.virtual_memory().available)
    left = cgroup.memory_left(cgroup.read_groups())
    return available if left is None else min(available, left)


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
