"""What a collector knows: the fleet's devices, and the newest outcome of each device with each version.

One SQLite file (WAL, `synchronous=FULL`): what was acknowledged to a device survives a power cut. It does
not grow with time: a device has at most OUTCOMES rows, devices have a bound, and outcomes that nothing was
heard of for `retention` seconds go. The rows of devices stay: they hold the sequence numbers that refuse
replays.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec

from lichen.errors import FleetError, Forbidden, Unauthorized, Unavailable
from lichen.sync.gates import Outcome
from lichen.sync.reporting.wire import Batch, UpdateReport, device_id

APPLICATION_ID = 0x4C634643  # "LcFC"
VERSION = 1
OUTCOMES = 64  # rows of one device
_COLUMNS = (
    *("device", "slot", "sha256", "sequence", "at", "target", "state", "cause", "code", "requests"),
    *("errors", "rate", "rate_before", "quality", "tags", "hardware"),
)
Membership = Literal["member", "waiting", "expelled"]
_TABLES = """
CREATE TABLE devices (
    id TEXT PRIMARY KEY,
    key BLOB NOT NULL,
    membership TEXT NOT NULL CHECK (membership IN ('member', 'waiting', 'expelled')),
    joined REAL NOT NULL,
    seen REAL NOT NULL,
    skew REAL NOT NULL DEFAULT 0,
    sequence INTEGER NOT NULL DEFAULT 0,
    lichen TEXT NOT NULL DEFAULT '',
    hardware TEXT NOT NULL DEFAULT '',
    tags TEXT NOT NULL DEFAULT '{}',
    dropped INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE TABLE outcomes (
    device TEXT NOT NULL,
    slot TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    at REAL NOT NULL,
    target TEXT NOT NULL,
    state TEXT NOT NULL,
    cause TEXT NOT NULL,
    code TEXT NOT NULL,
    requests INTEGER NOT NULL,
    errors INTEGER NOT NULL,
    rate REAL,
    rate_before REAL,
    quality REAL,
    PRIMARY KEY (device, slot, sha256)
) STRICT, WITHOUT ROWID;
CREATE INDEX outcomes_of_slot ON outcomes (slot, sha256);
CREATE INDEX outcomes_by_age ON outcomes (at);
"""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A device as the collector knows it. Times: seconds since 1970 by the collector's clock.

    skew: seconds that the device's clock is behind. dropped: reports that it had no room for.
    """

    id: str
    membership: Membership
    joined: float
    seen: float
    skew: float
    lichen: str
    hardware: str
    tags: dict[str, str]
    dropped: int


class Reported(Outcome, frozen=True, kw_only=True):
    """An outcome and what only people look at. at: seconds since 1970 by the collector's clock."""

    slot: str
    target: str
    sequence: int
    at: float
    code: str = ""


class Database:
    """One open file, for one thread at a time. Raises FleetError for whatever goes wrong with it."""

    def __init__(self, path: Path | str, *, max_devices: int, retention: float) -> None:
        self._path, self._max_devices, self._retention = path, max_devices, retention
        with self._translated():
            if isinstance(path, Path):
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                path.touch(mode=0o600)
            self._connection = sqlite3.connect(
                path, timeout=10, isolation_level=None, check_same_thread=False
            )
            self._prepare()

    def close(self) -> None:
        """Close the file; idempotent."""
        self._connection.close()

    def join(self, key: bytes, now: float, membership: Membership) -> Membership:
        """Take a device in, or leave it as it is; its membership. Raises Unavailable past the bound."""
        with self._changing():
            found = self._connection.execute(
                "SELECT membership FROM devices WHERE id = ?", (device_id(key),)
            ).fetchone()
            if found is not None:
                known: Membership = found[0]
                return known
            (count,) = self._connection.execute("SELECT count(*) FROM devices").fetchone()
            if count >= self._max_devices:
                raise Unavailable(
                    f"The collector has its {self._max_devices:,} devices.", hint="Raise --max-devices."
                )
            self._connection.execute(
                "INSERT INTO devices (id, key, membership, joined, seen) VALUES (?, ?, ?, ?, ?)",
                (device_id(key), key, membership, now, now),
            )
        return membership

    def key(self, device: str) -> bytes:
        """A device's public key. Raises Unauthorized for an unknown one, Forbidden for an expelled one."""
        with self._translated():
            found = self._connection.execute(
                "SELECT key, membership FROM devices WHERE id = ?", (device,)
            ).fetchone()
        if found is None:
            raise Unauthorized("The collector does not know this device.", hint="It has to join first.")
        if found[1] == "expelled":
            raise Forbidden("This device was expelled from the fleet's reports.")
        return bytes(found[0])

    def take(self, batch: Batch, now: float) -> tuple[int, int]:
        """Keep the reports that are new; the highest sequence number, and how many were new.

        A report whose number is not above the device's highest is a replay, or sent twice since the answer
        was lost: it changes nothing. Times become the collector's by the skew of `sent`.
        """
        skew, tags = now - batch.sent, msgspec.json.encode(batch.tags).decode()
        with self._changing():
            (last,) = self._connection.execute(
                "SELECT coalesce(max(sequence), 0) FROM devices WHERE id = ?", (batch.device,)
            ).fetchone()
            fresh = [each for each in batch.reports if each.sequence > last]
            if batch.reports and not fresh:
                return int(last), 0
            for report in sorted(fresh, key=lambda each: each.sequence):
                self._keep(batch.device, report, min(report.at + skew, now))
            highest = max((each.sequence for each in fresh), default=last)
            self._connection.execute(
                "UPDATE devices SET sequence = ?, seen = ?, skew = ?, lichen = ?, hardware = ?, tags = ?, "
                "dropped = ? WHERE id = ?",
                (highest, now, skew, batch.lichen, batch.hardware, tags, batch.dropped, batch.device),
            )
            self._connection.execute(
                "DELETE FROM outcomes WHERE device = ?1 AND sequence <= (SELECT sequence FROM outcomes "
                "WHERE device = ?1 ORDER BY sequence DESC LIMIT 1 OFFSET ?2)",
                (batch.device, OUTCOMES),
            )
        return int(highest), len(fresh)

    def forget_old(self, now: float) -> int:
        """Let outcomes go that nothing was heard of for the retention time; how many."""
        with self._changing():
            return self._connection.execute(
                "DELETE FROM outcomes WHERE at < ?", (now - self._retention,)
            ).rowcount

    def members(self) -> list[Member]:
        """All devices, by id."""
        names = Member.__struct_fields__
        with self._translated():
            rows = self._connection.execute(f"SELECT {', '.join(names)} FROM devices ORDER BY id").fetchall()
        found = []
        for row in rows:
            fields = dict(zip(names, row, strict=True))
            found.append(Member(**fields | {"tags": msgspec.json.decode(fields["tags"])}))
        return found

    def change(self, device: str, membership: Membership) -> None:
        """Let a device in, or expel it. Raises FleetError for an unknown one."""
        with self._changing():
            done = self._connection.execute(
                "UPDATE devices SET membership = ? WHERE id = ?", (membership, device)
            )
            if not done.rowcount:
                raise FleetError(f"The collector knows no device {device!r}.")

    def slots(self) -> list[str]:
        """Everything that somebody reported on, sorted."""
        with self._translated():
            rows = self._connection.execute("SELECT DISTINCT slot FROM outcomes ORDER BY slot").fetchall()
        return [slot for (slot,) in rows]

    def reported(self, slot: str) -> list[Reported]:
        """Outcomes of the members with every version of a slot, oldest first."""
        with self._translated():
            rows = self._connection.execute(
                "SELECT device, slot, sha256, outcomes.sequence, at, target, state, cause, code, requests, "
                "errors, rate, rate_before, quality, tags, hardware "
                "FROM outcomes JOIN devices ON devices.id = device "
                "WHERE slot = ? AND membership = 'member' ORDER BY at, outcomes.sequence",
                (slot,),
            ).fetchall()
        return [_reported(dict(zip(_COLUMNS, row, strict=True))) for row in rows]

    def _keep(self, device: str, report: UpdateReport, at: float) -> None:
        fields = msgspec.structs.asdict(report) | {"device": device, "at": at}
        names = ", ".join(fields)
        marks = ", ".join(f":{name}" for name in fields)
        self._connection.execute(f"INSERT OR REPLACE INTO outcomes ({names}) VALUES ({marks})", fields)

    def _prepare(self) -> None:
        (application,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        (tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and (application, version) != (APPLICATION_ID, VERSION):
            raise FleetError(
                f"{self._path} is no collector's file of this version.", hint="Take another folder."
            )
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        if not tables:
            self._connection.executescript(
                f"BEGIN; {_TABLES} PRAGMA application_id = {APPLICATION_ID}; "
                f"PRAGMA user_version = {VERSION}; COMMIT;"
            )

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._translated():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise FleetError(f"The collector's file {self._path} cannot be used: {error}.") from error
        except OSError as error:
            raise FleetError(
                f"The collector's file {self._path} cannot be used: {error.strerror}."
            ) from error


def _reported(row: dict[str, Any]) -> Reported:
    requests, errors, rate, before = (row.pop(n) for n in ("requests", "errors", "rate", "rate_before"))
    return Reported(
        **row | {"tags": msgspec.json.decode(row["tags"])},
        errors=min(1.0, errors / requests) if requests else None,
        speed=min(1e6, rate / before) if rate is not None and before else None,
    )
