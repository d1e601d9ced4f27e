"""Whether this machine runs from a battery, and whether heat slows it down.

Sources: Documentation/ABI/testing/sysfs-class-power and sysfs-class-thermal of Linux, and the counters of
the thermal monitor of Intel processors; psutil tells of batteries elsewhere.
"""

from __future__ import annotations

import platform

import msgspec

from lichen.devices.sysfs import Files, matching, number

POWER_FILES = tuple(
    f"/sys/class/power_supply/*/{name}" for name in ("type", "scope", "status", "capacity", "online")
)
HEAT_FILES = (
    "/sys/class/thermal/thermal_zone[0-9]*/type",
    "/sys/class/thermal/thermal_zone[0-9]*/temp",
    "/sys/class/thermal/thermal_zone[0-9]*/trip_point_[0-9]*_type",
    "/sys/class/thermal/thermal_zone[0-9]*/trip_point_[0-9]*_temp",
    "/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count",
)
_HOTTEST = 200_000  # thousandths of a degree; a sensor that says more is broken


class Power(msgspec.Struct, frozen=True, kw_only=True):
    """Battery charge from 0 to 100 and whether mains power is there; None where nothing tells."""

    battery: int | None = None
    mains: bool | None = None

    @property
    def on_battery(self) -> bool:
        """Whether a charge is being used up."""
        return self.battery is not None and self.mains is False


class Heat(msgspec.Struct, frozen=True, kw_only=True):
    """celsius: the hottest sensor. limit: where the system slows the processor for it (its passive trip
    point). throttled: times that it did so since the start. None where nothing tells."""

    celsius: float | None = None
    limit: float | None = None
    throttled: int | None = None

    @property
    def slowed(self) -> bool:
        """Whether a sensor is at the point where the system slows the processor."""
        return self.celsius is not None and self.limit is not None and self.celsius >= self.limit


def power(files: Files) -> Power:
    """From sysfs; batteries of mice and phones (scope Device) do not count."""
    charges: list[int] = []
    mains: bool | None = None
    discharging = False
    for name, kind in matching(files, "/sys/class/power_supply/*/type"):
        folder = name.removesuffix("/type")
        if files.get(f"{folder}/scope") == "Device":
            continue
        if kind == "Battery":
            charge = number(files.get(f"{folder}/capacity"))
            if charge is not None and charge <= 100:
                charges.append(charge)
                discharging = discharging or files.get(f"{folder}/status") == "Discharging"
        elif kind in ("Mains", "USB") and (online := files.get(f"{folder}/online")) in ("0", "1"):
            mains = bool(mains) or online == "1"
    if mains is None and charges:
        mains = not discharging
    return Power(battery=min(charges, default=None), mains=mains)


def power_now(files: Files) -> Power:
    """From sysfs on Linux, from psutil elsewhere."""
    if platform.system() == "Linux":
        return power(files)
    import psutil

    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is None:
        return Power()
    return Power(battery=max(0, min(100, round(battery.percent))), mains=battery.power_plugged)


def heat(files: Files) -> Heat:
    """The hottest of the sensors, measured against its own limit, and how often a core was slowed.

    A sensor at or above its limit counts as hotter than one that is warmer but below its own.
    """
    hottest: tuple[bool, int] | None = None
    limit: int | None = None
    for name, _ in matching(files, "/sys/class/thermal/thermal_zone*/type"):
        folder = name.removesuffix("/type")
        degrees = number(files.get(f"{folder}/temp"))
        if degrees is None or not 0 < degrees < _HOTTEST:
            continue
        passive = _passive(files, folder)
        rank = (passive is not None and degrees >= passive, degrees)
        if hottest is None or rank > hottest:
            hottest, limit = rank, passive
    counts = [number(text) for _, text in matching(files, "/sys/devices/system/cpu/cpu*/thermal_throttle/*")]
    known = [count for count in counts if count is not None]
    return Heat(
        celsius=hottest[1] / 1000 if hottest is not None else None,
        limit=limit / 1000 if limit is not None else None,
        throttled=max(known) if known else None,
    )


def _passive(files: Files, folder: str) -> int | None:
    """The lowest point, in thousandths of a degree, at which the system cools by slowing down."""
    points = []
    for name, kind in matching(files, f"{folder}/trip_point_*_type"):
        degrees = number(files.get(f"{name.removesuffix('_type')}_temp"))
        if kind == "passive" and degrees is not None and 0 < degrees < _HOTTEST:
            points.append(degrees)
    return min(points, default=None)
