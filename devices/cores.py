"""Which cores a processor has (real ones, fast ones, thrifty ones), their caches, and nodes of memory.

Computing in step with a thrifty core makes every fast one wait for it, so that llama.cpp runs best on the
fast cores alone; two threads of one core share its arithmetic, so that the second gains nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from lichen.devices.sysfs import Files, in_name, matching, number, number_list, size

_CPU = "/sys/devices/system/cpu/cpu"
CORE_FILES = (
    f"{_CPU}[0-9]*/cpu_capacity",
    f"{_CPU}[0-9]*/cpufreq/cpuinfo_max_freq",
    f"{_CPU}[0-9]*/topology/core_cpus_list",
    f"{_CPU}[0-9]*/topology/thread_siblings_list",
    "/sys/devices/cpu_core/cpus",
    "/sys/devices/cpu_atom/cpus",
)
CACHE_FILES = tuple(
    f"{_CPU}[0-9]*/cache/index[0-9]*/{name}" for name in ("level", "type", "size", "shared_cpu_list")
)
NODE_FILES = ("/sys/devices/system/node/node[0-9]*/cpulist", "/sys/devices/system/node/node[0-9]*/meminfo")

_KINDS = ("Data", "Instruction", "Unified")

# Boost steps of equal cores differ by a few per cent; thrifty cores have at most two thirds of the capacity
# of fast ones (Arm) or three quarters of their frequency (Intel, where the kernel names the kinds).
_FAST = 0.8


class Cores(msgspec.Struct, frozen=True, kw_only=True):
    """Cores that this process may use. threads: logical processors. max_mhz: 0 where nothing tells."""

    physical: int
    performance: int
    efficiency: int
    threads: int
    max_mhz: int = 0


class Cache(msgspec.Struct, frozen=True, kw_only=True):
    """One level of cache. kind: Data, Instruction or Unified. size: bytes of one instance."""

    level: int
    kind: str
    size: int
    instances: int


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A NUMA node. processors: logical ones. memory: bytes, 0 where nothing tells."""

    number: int
    processors: int
    memory: int


def cores(files: Files, usable: frozenset[int], physical: int = 0) -> Cores:
    """What sysfs tells of the `usable` logical processors, each named by its number.

    physical: cores as another source counts them, for where sysfs does not tell; 0: one a processor.
    """
    leaders = _leaders(files, usable)
    if not any(True for _ in matching(files, f"{_CPU}*/topology/*")) and physical:
        leaders = frozenset(sorted(usable)[:physical])
    thrifty = _thrifty(files, usable) & leaders
    speeds = _of_each(files, "cpufreq/cpuinfo_max_freq", usable)
    count = max(1, len(leaders))
    return Cores(
        physical=count,
        performance=count - len(thrifty),
        efficiency=len(thrifty),
        threads=max(1, len(usable)),
        max_mhz=max(speeds.values(), default=0) // 1000,
    )


def caches(files: Files) -> tuple[Cache, ...]:
    """Caches by level; one that several processors share counts once."""
    shared: dict[tuple[int, str, int], set[str]] = {}
    for name, text in matching(files, f"{_CPU}*/cache/index*/level"):
        folder = name.rpartition("/")[0]
        level, bytes_ = number(text), size(files.get(f"{folder}/size"))
        kind = files.get(f"{folder}/type", "")
        if level is None or not 1 <= level <= 9 or not bytes_ or kind not in _KINDS:
            continue
        sharers = files.get(f"{folder}/shared_cpu_list") or folder
        shared.setdefault((level, kind, bytes_), set()).add(sharers)
    return tuple(
        Cache(level=level, kind=kind, size=bytes_, instances=len(sharers))
        for (level, kind, bytes_), sharers in sorted(shared.items())
    )


def nodes(files: Files) -> tuple[Node, ...]:
    """NUMA nodes with processors or memory; none where Linux does not tell."""
    found = []
    for name, text in matching(files, "/sys/devices/system/node/node*/cpulist"):
        which = in_name(name, "node")
        memory = _node_memory(files.get(name.replace("/cpulist", "/meminfo"), ""))
        processors = len(number_list(text))
        if which is not None and (processors or memory):
            found.append(Node(number=which, processors=processors, memory=memory))
    return tuple(found)


def _node_memory(text: str) -> int:
    for line in text.splitlines():
        name, _, value = line.partition("MemTotal:")
        kilobytes = number(value.removesuffix("kB").strip()) if name != line else None
        if kilobytes is not None and kilobytes < 1 << 50:
            return kilobytes << 10
    return 0


def _leaders(files: Files, usable: frozenset[int]) -> frozenset[int]:
    """The first usable thread of each core."""
    leaders = set()
    for cpu in usable:
        text = files.get(f"{_CPU}{cpu}/topology/core_cpus_list")
        text = text or files.get(f"{_CPU}{cpu}/topology/thread_siblings_list")
        siblings = number_list(text) & usable
        leaders.add(min(siblings) if cpu in siblings else cpu)
    return frozenset(leaders)


def _thrifty(files: Files, usable: frozenset[int]) -> frozenset[int]:
    """Processors of efficiency cores, by the first source that tells kinds apart; never all of them."""
    fast = number_list(files.get("/sys/devices/cpu_core/cpus"))
    atom = number_list(files.get("/sys/devices/cpu_atom/cpus"))
    if fast and atom:
        named = atom & usable
        return named if named < usable else frozenset()
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        values = _of_each(files, name, usable)
        if values and values.keys() == usable:
            bound = _FAST * max(values.values())
            if slow := frozenset(cpu for cpu, value in values.items() if value < bound):
                return slow
    return frozenset()


def _of_each(files: Files, name: str, usable: Iterable[int]) -> dict[int, int]:
    found = {cpu: number(files.get(f"{_CPU}{cpu}/{name}")) for cpu in usable}
    return {cpu: value for cpu, value in found.items() if value}
