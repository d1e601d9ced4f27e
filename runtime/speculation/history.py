"""How drafts went lately, minute by minute, for `/status` and `lichen top`."""

from __future__ import annotations

import time

import msgspec

MINUTES = 60  # that are remembered


class DraftMinute(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens drafted, and of them right, in one minute that began `minutes_ago` whole minutes ago."""

    minutes_ago: int
    drafted: int
    accepted: int


class DraftHistory:
    """The last hour. One thread counts, any may read."""

    def __init__(self) -> None:
        # By minute of a steady clock modulo MINUTES: (minute, drafted, accepted), each replaced as a whole.
        self._ring: list[tuple[int, int, int]] = [(-MINUTES, 0, 0)] * MINUTES

    def count(self, drafted: int, accepted: int, now: float | None = None) -> None:
        """A draft was checked. now: seconds of the steady clock."""
        minute = _minute(now)
        known, before, right = self._ring[minute % MINUTES]
        if known != minute:
            before = right = 0
        self._ring[minute % MINUTES] = (minute, before + drafted, right + accepted)

    def recent(self, now: float | None = None) -> list[DraftMinute]:
        """Minutes in which something was drafted, the oldest first."""
        this = _minute(now)
        return [
            DraftMinute(minutes_ago=this - minute, drafted=drafted, accepted=accepted)
            for minute, drafted, accepted in sorted(self._ring)
            if drafted and this - minute < MINUTES
        ]


def _minute(now: float | None) -> int:
    return int((time.monotonic() if now is None else now) // 60)
