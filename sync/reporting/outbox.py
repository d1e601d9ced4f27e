"""Reports that have not arrived yet: a bounded SQLite file (WAL, `synchronous=FULL`), safe from power cuts.

Every report gets the next sequence number, which is never below the milliseconds since 1970: a device whose
file was lost goes on above what the collector has seen, as long as its clock is not behind. Past the bound
the oldest report goes and is counted, since a new state says more than an old one.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from lichen.errors import FleetError
from lichen.sync.reporting.wire import BATCH, UpdateReport

BOUND = 10_000  # reports, about 4 MB
_TABLES = """
CREATE TABLE IF NOT EXISTS reports (sequence INTEGER PRIMARY KEY, body BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS counts (
    one INTEGER PRIMARY KEY CHECK (one = 1), last INTEGER NOT NULL, dropped INTEGER NOT NULL
) STRICT;
INSERT OR IGNORE INTO counts VALUES (1, 0, 0);
"""


class Outbox:
    """Reports of one device, waiting. Each call is one transaction; several processes may share the file.

    path: the file, made at need (":memory:" for none). clock: seconds since 1970. Raises FleetError.
    """

    def __init__(
        self, path: Path | str, *, bound: int = BOUND, clock: Callable[[], float] = time.time
    ) -> None:
        self._path, self._bound, self._clock = path, bound, clock
        try:
            self._connection = self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) or not isinstance(path, Path):
                raise FleetError(f"The reports in {path} cannot be used: {error}.") from error
            for end in ("-wal", "-shm", ""):  # a damaged outbox costs the reports in it, never an update
                path.with_name(path.name + end).unlink(missing_ok=True)
            self._connection = self._open()
        except OSError as error:
            raise FleetError(f"The reports in {path} cannot be used: {error.strerror}.") from error

    def close(self) -> None:
        """Close the file; idempotent."""
        self._connection.close()

    def put(self, report: UpdateReport) -> int:
        """Keep a report durably under the next sequence number, which replaces its own; that number."""
        with self._changing():
            (last,) = self._connection.execute("SELECT last FROM counts").fetchone()
            sequence = max(int(last) + 1, int(self._clock() * 1000), 1)
            body = msgspec.json.encode(msgspec.structs.replace(report, sequence=sequence))
            self._connection.execute("INSERT INTO reports VALUES (?, ?)", (sequence, body))
            self._connection.execute("UPDATE counts SET last = ?", (sequence,))
            gone = self._connection.execute(
                "DELETE FROM reports WHERE sequence <= "
                "(SELECT sequence FROM reports ORDER BY sequence DESC LIMIT 1 OFFSET ?)",
                (self._bound,),
            ).rowcount
            self._connection.execute("UPDATE counts SET dropped = dropped + ?", (gone,))
        return sequence

    def waiting(self, limit: int = BATCH) -> tuple[UpdateReport, ...]:
        """The oldest reports that have not arrived."""
        with self._translated():
            rows = self._connection.execute(
                "SELECT body FROM reports ORDER BY sequence LIMIT ?", (limit,)
            ).fetchall()
        return tuple(msgspec.json.decode(body, type=UpdateReport) for (body,) in rows)

    def dropped(self) -> int:
        """How many reports went because there was no room."""
        with self._translated():
            return int(self._connection.execute("SELECT dropped FROM counts").fetchone()[0])

    def arrived(self, sent: Sequence[UpdateReport], seen: int) -> None:
        """Forget what was sent. seen: the highest sequence number that the collector has of this device.

        If that is above all numbers given here, this file is younger than what the collector knows, which
        then took the batch for an old one: everything gets a new number above it and stays.
        """
        with self._changing():
            (last,) = self._connection.execute("SELECT last FROM counts").fetchone()
            if seen > last:
                self._renumber(seen + 1)
                return
            self._connection.executemany(
                "DELETE FROM reports WHERE sequence = ?", [(each.sequence,) for each in sent]
            )

    def _renumber(self, first: int) -> None:
        """Inside a transaction: number all that waits from `first` on."""
        rows = self._connection.execute("SELECT body FROM reports ORDER BY sequence").fetchall()
        self._connection.execute("DELETE FROM reports")
        for sequence, (body,) in enumerate(rows, first):
            moved = msgspec.structs.replace(msgspec.json.decode(body, type=UpdateReport), sequence=sequence)
            self._connection.execute(
                "INSERT INTO reports VALUES (?, ?)", (sequence, msgspec.json.encode(moved))
            )
        self._connection.execute("UPDATE counts SET last = ?", (first + len(rows) - 1,))

    def _open(self) -> sqlite3.Connection:
        if isinstance(self._path, Path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if not self._path.exists():
                self._path.touch(mode=0o600)
        connection = sqlite3.connect(self._path, timeout=10, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.executescript(_TABLES)
            with closing(connection.execute("PRAGMA quick_check(1)")) as found:
                if found.fetchone()[0] != "ok":
                    raise sqlite3.DatabaseError("damaged")
        except BaseException:
            connection.close()
            raise
        return connection

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
            raise FleetError(f"The reports in {self._path} cannot be used: {error}.") from error
