"""What macOS tells of its processor through `sysctl`, in the words that Linux uses."""

from __future__ import annotations

import subprocess

from lichen.devices.sysfs import number

NAMES = (
    "machdep.cpu.brand_string",
    "machdep.cpu.features",
    "machdep.cpu.leaf7_features",
    "hw.physicalcpu",
    "hw.perflevel0.physicalcpu",
    "hw.perflevel1.physicalcpu",
    "hw.optional.AdvSIMD",
    "hw.optional.arm.FEAT_DotProd",
    "hw.optional.arm.FEAT_I8MM",
    "hw.optional.arm.FEAT_BF16",
)
_SWITCHES = {
    "hw.optional.AdvSIMD": "asimd",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
}
_WAIT_S = 2.0


def sysctl() -> str:
    """Lines "name: value" for those of `NAMES` that this system knows; empty when it cannot be asked."""
    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", *NAMES], capture_output=True, timeout=_WAIT_S, check=False
        )  # names that it does not know cost an exit code and a line on stderr
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace")


def fields(text: str) -> dict[str, str]:
    """Values by name."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}


def processor(text: str) -> tuple[str, frozenset[str]]:
    """Name and feature flags, as `parse_cpuinfo` gives them on Linux."""
    found = fields(text)
    words = f"{found.get('machdep.cpu.features', '')} {found.get('machdep.cpu.leaf7_features', '')}".lower()
    flags = {"avx" if word == "avx1.0" else word.replace(".", "_") for word in words.split()}
    flags |= {flag for name, flag in _SWITCHES.items() if found.get(name) == "1"}
    return found.get("machdep.cpu.brand_string", ""), frozenset(flags)


def core_counts(text: str) -> tuple[int, int]:
    """Fast and thrifty cores; Macs with processors by Intel have only fast ones. 0 where nothing tells."""
    found = fields(text)
    fast = number(found.get("hw.perflevel0.physicalcpu")) or number(found.get("hw.physicalcpu")) or 0
    return fast, number(found.get("hw.perflevel1.physicalcpu")) or 0
