"""Graphics processors that a model could use, without loading anything heavy.

Asked in this order: NVIDIA's driver files, AMD's, NVML where `nvidia-ml-py` is installed, and torch where
the program has imported it already. Not covered: integrated graphics, which share the system's memory.
Sources: /proc/driver/nvidia of NVIDIA's driver; the amdgpu section of Linux' GPU documentation.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import msgspec

from lichen.devices.sysfs import Files, matching, number

GPU_FILES = (
    "/proc/driver/nvidia/gpus/*/information",
    "/sys/class/drm/card[0-9]*/device/vendor",
    "/sys/class/drm/card[0-9]*/device/product_name",
    "/sys/class/drm/card[0-9]*/device/mem_info_vram_total",
)
_AMD = "0x1002"
_INTEGRATED = 1 << 30  # bytes of video memory; below it, a card is part of the processor
_NAME = re.compile(r"[^\x20-\x7e]+")
_NAME_LENGTH = 80


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """memory: bytes in all, 0 where nothing tells. source: driver, nvml or torch."""

    name: str
    memory: int = 0
    source: str


def gpus_now(files: Files) -> tuple[Gpu, ...]:
    """GPUs of this machine. Raises nothing: a broken driver is as good as none."""
    found = nvidia(files, _device_numbers()) + amd(files)
    told = _nvml()
    if told and len(told) >= len(found):  # it knows the memory too
        return told
    return found or _torch()


def nvidia(files: Files, devices: frozenset[int]) -> tuple[Gpu, ...]:
    """GPUs of NVIDIA's driver whose device file is here: a container sees names of GPUs that it has not got.

    devices: the numbers of the files /dev/nvidia<number>.
    """
    found = []
    for _, text in matching(files, "/proc/driver/nvidia/gpus/*/information"):
        pairs = (line.partition(":") for line in text.splitlines())
        fields = {key.strip(): value.strip() for key, _, value in pairs}
        name = clean(fields.get("Model", ""))
        if name and number(fields.get("Device Minor")) in devices:
            found.append(Gpu(name=name, source="driver"))
    return tuple(found)


def amd(files: Files) -> tuple[Gpu, ...]:
    """GPUs of the amdgpu driver with memory of their own."""
    found = []
    for name, vendor in matching(files, "/sys/class/drm/card*/device/vendor"):
        folder = name.removesuffix("/vendor")
        memory = number(files.get(f"{folder}/mem_info_vram_total")) or 0
        if vendor == _AMD and memory >= _INTEGRATED:
            label = clean(files.get(f"{folder}/product_name", "")) or "AMD GPU"
            found.append(Gpu(name=label, memory=memory, source="driver"))
    return tuple(found)


def clean(name: str) -> str:
    """A name of at most 80 printable characters of ASCII."""
    return " ".join(_NAME.sub(" ", name).split())[:_NAME_LENGTH]


def _device_numbers() -> frozenset[int]:
    with contextlib.suppress(OSError):
        numbers = (number(path.name.removeprefix("nvidia")) for path in Path("/dev").glob("nvidia[0-9]*"))
        return frozenset(found for found in numbers if found is not None)
    return frozenset()


def _nvml() -> tuple[Gpu, ...]:
    if importlib.util.find_spec("pynvml") is None:
        return ()
    found = []
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        try:
            for index in range(nvml.nvmlDeviceGetCount()):
                device = nvml.nvmlDeviceGetHandleByIndex(index)
                name = nvml.nvmlDeviceGetName(device)
                memory = int(nvml.nvmlDeviceGetMemoryInfo(device).total)
                text = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
                found.append(Gpu(name=clean(text), memory=memory, source="nvml"))
        finally:
            nvml.nvmlShutdown()
    except Exception:  # of NVML's own tree, which is only known once it is imported
        return ()
    return tuple(found)


def _torch() -> tuple[Gpu, ...]:
    torch: Any = sys.modules.get("torch")  # never imported for this: it takes seconds
    try:
        if torch is None or not torch.cuda.is_available():
            return ()
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return tuple(
            Gpu(name=clean(one.name), memory=int(one.total_memory), source="torch") for one in properties
        )
    except Exception:  # a driver that does not fit; torch raises plain RuntimeErrors and AssertionErrors
        return ()
