"""Everything that is known of this machine, and the class of machines that it belongs to.

Two machines of one class run models alike, so what was measured on the one holds for the other. The class
is made of what stays: processor, cores that may be used, memory, GPUs; not of charge, heat or free memory.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import msgspec

from lichen.devices.cores import CACHE_FILES, NODE_FILES, Cache, Cores, Node, caches, nodes
from lichen.devices.disk import DiskSpeed, measure_disk
from lichen.devices.gpu import GPU_FILES, Gpu, gpus_now
from lichen.devices.power import HEAT_FILES, POWER_FILES, Heat, Power, heat, power_now
from lichen.devices.probe import Machine, probe, processor
from lichen.devices.sysfs import read_files

_CLASS_VERSION = "1"  # a change makes all that was measured unknown


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """A machine in full; sizes in bytes. hardware_class: 12 hexadecimal digits. disk: where asked for."""

    hardware_class: str
    machine: Machine
    cores: Cores
    caches: tuple[Cache, ...]
    nodes: tuple[Node, ...]
    gpus: tuple[Gpu, ...]
    power: Power
    heat: Heat
    swap_total: int
    swap_used: int
    disk: DiskSpeed | None = None


def examine(disk: Path | None = None) -> Hardware:
    """Look at everything; some ten milliseconds. disk: a folder whose disk is measured, for about 2 s.

    Raises DiskFull and StoreError for the disk, and nothing else.
    """
    import psutil

    files = read_files((*CACHE_FILES, *NODE_FILES, *GPU_FILES, *POWER_FILES, *HEAT_FILES))
    machine, gpus, swap = probe(), gpus_now(files), psutil.swap_memory()
    return Hardware(
        hardware_class=hardware_class(machine, gpus),
        machine=machine,
        cores=processor()[2],
        caches=caches(files),
        nodes=nodes(files),
        gpus=gpus,
        power=power_now(files),
        heat=heat(files),
        swap_total=int(swap.total),
        swap_used=int(swap.used),
        disk=measure_disk(disk) if disk is not None else None,
    )


def class_here() -> str:
    """The class of this machine."""
    return hardware_class(probe(), gpus_now(read_files(GPU_FILES)))


def hardware_class(machine: Machine, gpus: tuple[Gpu, ...]) -> str:
    """A short name for all machines like this one.

    GPUs that only torch tells of do not count: whether it is asked depends on the program.
    """
    facts = (
        _CLASS_VERSION,
        " ".join(machine.cpu.split()),
        machine.isa,
        ",".join(machine.features),
        str(machine.physical_cores),
        str(machine.threads),
        f"{machine.cores:.2f}",
        str(memory_step(machine.memory_total)),
        *sorted(gpu.name for gpu in gpus if gpu.source != "torch"),
    )
    return hashlib.sha256("\0".join(facts).encode("utf-8", "replace")).hexdigest()[:12]


def memory_step(size: int) -> int:
    """The nearest of the sizes 2^n and 1.5 x 2^n bytes: firmware and kernels keep a little of a module."""
    if size <= 0:
        return 0
    power = 1 << (size.bit_length() - 1)
    steps = (power, power * 3 // 2, power * 2)
    return min(steps, key=lambda step: abs(math.log(size / step)) if step else math.inf)
