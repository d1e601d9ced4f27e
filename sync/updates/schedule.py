"""When a machine may work on updates by itself: pure rules over what the system tells about it now.

    state          waits for
    offered        the window, power, a link that is not metered
    downloading    the same: a download that is under way stops when the rules say so
    staged         the window and power: the trial computes

What the system does not tell does not hold an update back.
"""

from __future__ import annotations

import datetime
import subprocess
from typing import Annotated

import msgspec
from msgspec import Meta

from lichen.errors import ConfigError
from lichen.sync.updates.states import Update

BATTERY_IS_LOW = 0.2  # below this an update waits, whatever the rules allow
ASK_S = 2.0  # seconds that the system gets to answer
_METERED = (  # https://networkmanager.dev/docs/api/latest/nm-dbus-types.html#NMMetered
    *("busctl", "get-property", "org.freedesktop.NetworkManager", "/org/freedesktop/NetworkManager"),
    *("org.freedesktop.NetworkManager", "Metered"),
)


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """window: local hours such as "22:00-06:00", "" for all day. metered, battery: whether to go on there."""

    window: Annotated[str, Meta(max_length=11)] = ""
    metered: bool = False
    battery: bool = False

    def hours(self) -> tuple[datetime.time, datetime.time] | None:
        """From when to when; None for all day. Raises ConfigError."""
        if not self.window:
            return None
        try:
            begin, end = (datetime.time.fromisoformat(part) for part in self.window.split("-"))
        except ValueError as error:
            raise ConfigError(
                f"{self.window!r} is no window.", hint="Write it as 22:00-06:00.", param="fleet_window"
            ) from error
        return begin, end


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the system tells; None for what it does not. charge: 0 to 1. at: local time of day."""

    at: datetime.time
    metered: bool | None = None
    on_battery: bool | None = None
    charge: float | None = None


def waits(rules: Rules, facts: Facts, update: Update) -> str:
    """Why an update has to wait in its state, in one sentence; "" if it may go on. Raises ConfigError."""
    if update.state not in ("offered", "downloading", "staged"):
        return ""
    if facts.on_battery and not rules.battery:
        return "It waits for mains power."
    if facts.on_battery and facts.charge is not None and facts.charge < BATTERY_IS_LOW:
        return "It waits until the battery is charged."
    if update.state != "staged" and facts.metered and not rules.metered:
        return "It waits for a connection that is not metered."
    hours = rules.hours()
    if hours is not None and not _inside(facts.at, *hours):
        return f"It waits for the hours {rules.window}."
    return ""


def look() -> Facts:
    """What the system tells now. Blocks, up to ASK_S seconds."""
    import psutil

    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return Facts(
        at=datetime.datetime.now().time(),
        metered=_metered(),
        on_battery=None if battery is None else not battery.power_plugged,
        charge=None if battery is None else battery.percent / 100,
    )


def _inside(at: datetime.time, begin: datetime.time, end: datetime.time) -> bool:
    """A window may go over midnight; one that ends where it begins is all day."""
    if begin < end:
        return begin <= at < end
    return at >= begin or at < end


def _metered() -> bool | None:
    """What NetworkManager says or guesses of the connection, where it runs."""
    try:
        said = subprocess.run(_METERED, capture_output=True, text=True, timeout=ASK_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    number = said.split()[-1] if said.split() else ""
    return {"1": True, "3": True, "2": False, "4": False}.get(number)
