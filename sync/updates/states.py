"""The states of an update, and which may follow which: no state lasts for ever.

    offered -> downloading -> downloaded -> staged -> active -> confirmed
       └───────────┴────────────┴───────────┴─────────┴──────-> rolled_back

Every state but the last two has a time-out, after which the update is rolled back; so it is when somebody
cancels it. This module is pure: the clock is passed in, as seconds since 1970.
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from lichen.errors import FleetError
from lichen.sync.manifest import AnyManifest
from lichen.sync.updates.health import Health, Measured

State = Literal["offered", "downloading", "downloaded", "staged", "active", "confirmed", "rolled_back"]
Cause = Literal["", "cancelled", "timed_out", "superseded", "refused", "failed", "unhealthy"]

STATES: tuple[State, ...] = get_args(State)
LAST: frozenset[State] = frozenset({"confirmed", "rolled_back"})
NEXT: dict[State, State] = {
    "offered": "downloading",
    "downloading": "downloaded",
    "downloaded": "staged",
    "staged": "active",
    "active": "confirmed",
}
HOUR = 3600.0
DAY = 24 * HOUR
TIMEOUTS: dict[State, float] = {  # seconds
    "offered": 14 * DAY,  # it waits for a window, for power, for a link that is not metered
    "downloading": 7 * DAY,
    "downloaded": DAY,
    "staged": 7 * DAY,  # it waits for the maintenance window
    "active": HOUR,
}


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """What this device should have under a name. A rollout decides it; without one it is asked for.

    slot: kind and name that it is used by, such as "models/support" for `fleet:support`. target: the path
    that the fleet signed, such as "models/support-7"; the same as the slot where nothing else is said.
    sha256: of the target's bytes, in hex; None takes what the path holds now. health: the bar of the trial,
    over that of the target's manifest. rollout: what decided it, for the report.
    """

    slot: str
    target: str
    sha256: str | None = None
    health: Health | None = None
    rollout: str = ""


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """One update of one slot. sha256: hex, of the target's bytes. size: bytes. Times: seconds since 1970.

    before: sha256 of the version that it replaces, "" for none. entered: when it came into its state.
    cause and reason: why it was rolled back (refused: it does not fit here; failed: this machine could not;
    unhealthy: it failed its trial and is never tried again). trials: how often the health prompt was begun.
    manifest: what the target says of itself. cancel: somebody asked for its end.
    """

    id: int
    slot: str
    target: str
    sha256: str
    size: int
    manifest: AnyManifest
    state: State
    begun: float
    entered: float
    before: str = ""
    rollout: str = ""
    cause: Cause = ""
    reason: str = ""
    trials: int = 0
    measured: Measured | None = None
    health: Health | None = None
    cancel: bool = False

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to it."""
        return self.state in LAST


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a device tells of an update whenever its state changes. at: seconds since 1970."""

    slot: str
    target: str
    sha256: str
    state: State
    at: float
    rollout: str = ""
    cause: Cause = ""
    reason: str = ""
    measured: Measured | None = None


def advanced(update: Update, state: State, now: float, *, cause: Cause = "", reason: str = "") -> Update:
    """The update in its next state. Raises FleetError for a state that may not follow."""
    allowed = not update.ended and state in (NEXT[update.state], "rolled_back")
    if not allowed or (state == "rolled_back") != bool(cause):
        raise FleetError(f"The update of {update.slot} cannot go from {update.state} to {state}.")
    return msgspec.structs.replace(update, state=state, entered=now, cause=cause, reason=reason)


def deadline(update: Update) -> float:
    """When its state times out, in seconds since 1970; infinite for the last states."""
    return update.entered + TIMEOUTS[update.state] if update.state in TIMEOUTS else float("inf")


def report(update: Update) -> Report:
    """What is told of it now."""
    return Report(
        slot=update.slot,
        target=update.target,
        sha256=update.sha256,
        state=update.state,
        at=update.entered,
        rollout=update.rollout,
        cause=update.cause,
        reason=update.reason,
        measured=update.measured,
    )
