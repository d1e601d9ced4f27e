"""Processors by name and level: a laptop, an Arm board; and this machine."""

from __future__ import annotations

import pytest

from lichen.devices.probe import isa_level, parse_cpuinfo, probe

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


def test_this_machine() -> None:
    machine = probe()
    assert 1 <= machine.threads <= machine.physical_cores
    assert 0 < machine.memory_available <= machine.memory_total
