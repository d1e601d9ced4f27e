"""Machines as fixtures: a laptop, a small container, an Arm board; and this one."""

from __future__ import annotations

import pytest

from lichen.devices.probe import (
    CPU_QUOTA_FILES,
    MEMORY_LIMIT_FILES,
    cpu_quota,
    isa_level,
    memory_limit,
    parse_cpuinfo,
    probe,
)

V2 = "cx16 popcnt sse4_1 sse4_2 ssse3"
V3 = f"{V2} avx avx2 bmi1 bmi2 f16c fma movbe"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"
LAPTOP = (
    f"processor\t: 0\nmodel name\t: A Laptop CPU\nflags\t\t: fpu {V3}\n\nprocessor\t: 1\nflags\t\t: none\n"
)
ARM_BOARD = "processor\t: 0\nFeatures\t: fp asimd asimddp\n\nModel\t\t: A Small Board\n"


def test_cpuinfo_of_a_laptop_and_of_an_arm_board() -> None:
    name, flags = parse_cpuinfo(LAPTOP)
    assert name == "A Laptop CPU"
    assert "avx2" in flags
    assert parse_cpuinfo(ARM_BOARD) == ("A Small Board", frozenset({"fp", "asimd", "asimddp"}))
    assert parse_cpuinfo("nonsense without a colon") == ("", frozenset())


@pytest.mark.parametrize(
    ("flags", "level"),
    [(V4, "x86-64-v4"), (V3, "x86-64-v3"), (V2, "x86-64-v2"), ("sse2", "x86-64"), ("", "x86-64")],
)
def test_levels(flags: str, level: str) -> None:
    assert isa_level("x86_64", frozenset(flags.split())) == level
    assert isa_level("aarch64", frozenset(flags.split())) == "aarch64"


@pytest.mark.parametrize(
    ("texts", "quota"),
    [
        (("50000 100000", "", ""), 0.5),
        (("max 100000", "", ""), None),
        (("", "150000", "100000"), 1.5),
        (("", "-1", "100000"), None),
        (("", "", ""), None),
        (("lies", "", ""), None),
        (("1 0", "", ""), None),
    ],
)
def test_processor_time_of_a_container(texts: tuple[str, str, str], quota: float | None) -> None:
    assert cpu_quota(dict(zip(CPU_QUOTA_FILES, texts, strict=True))) == quota


@pytest.mark.parametrize(
    ("texts", "limit"),
    [
        (("536870912", ""), 512 << 20),
        (("max", ""), None),
        (("", "9223372036854771712"), None),
        (("", ""), None),
    ],
)
def test_memory_of_a_container(texts: tuple[str, str], limit: int | None) -> None:
    assert memory_limit(dict(zip(MEMORY_LIMIT_FILES, texts, strict=True))) == limit


def test_this_machine() -> None:
    machine = probe()
    assert machine.physical_cores >= 1
    assert 0 < machine.memory_available <= machine.memory_total
