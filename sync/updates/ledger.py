"""The record of updates: one SQLite file, in which a state that was entered survives a power cut.

WAL with `synchronous=FULL`; each change is one transaction. What is in use does not depend on it (slots.py):
a damaged file is put aside and a new one begun, and recovery.py brings both together again.
"""

from __future__ import annotations

import datetime
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from lichen.errors import DiskFull, FleetError, StoreError
from lichen.sync.updates.states import Update

KEPT = 1000  # updates that have ended
BUSY_S = 10.0  # seconds to wait for another process that writes
SCHEMA = 1
_TABLE = """
CREATE TABLE updates (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    slot TEXT NOT NULL,
    state TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    body BLOB NOT NULL,
    cancel INTEGER NOT NULL DEFAULT 0,
    told INTEGER NOT NULL DEFAULT 0
) STRICT
"""


class Ledger:
    """The open record at `path` (made if need be), used by one thread at a time. Raises StoreError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._database = _opened(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise _translated(path, error) from error
            _put_aside(path)
            with _translation(path):
                self._database = _opened(path)
        except OSError as error:
            raise StoreError(f"{path} cannot be made: {error.strerror}.") from error

    def close(self) -> None:
        """Close the file; idempotent."""
        self._database.close()

    def add(self, update: Update) -> Update:
        """Begin an update; what comes back has its id."""
        with self._writing():
            cursor = self._database.execute(
                "INSERT INTO updates (slot, state, sha256, body) VALUES (?, ?, ?, ?)", _row(update)
            )
            self._database.execute(
                "DELETE FROM updates WHERE state IN ('confirmed', 'rolled_back') AND id <= ?",
                ((cursor.lastrowid or 0) - KEPT,),
            )
            return msgspec.structs.replace(update, id=cursor.lastrowid or 0)

    def save(self, update: Update) -> Update:
        """Note an update's new state; it has to be told of again."""
        with self._writing():
            self._database.execute(
                "UPDATE updates SET slot = ?, state = ?, sha256 = ?, body = ?, told = 0 WHERE id = ?",
                (*_row(update), update.id),
            )
        return update

    def ask_to_cancel(self, id: int) -> None:
        """Ask whoever carries an update out to end it."""
        with self._writing():
            self._database.execute("UPDATE updates SET cancel = 1 WHERE id = ?", (id,))

    def get(self, id: int) -> Update:
        """An update as it stands. Raises FleetError."""
        found = self._select("WHERE id = ?", id)
        if not found:
            raise FleetError(f"There is no update {id}.")
        return found[0]

    def all(self) -> list[Update]:
        """Every update that is remembered, the oldest first."""
        return self._select("ORDER BY id")

    def latest(self) -> dict[str, Update]:
        """The newest update of each slot."""
        newest = "WHERE id IN (SELECT max(id) FROM updates GROUP BY slot) ORDER BY slot"
        return {update.slot: update for update in self._select(newest)}

    def untold(self) -> list[Update]:
        """Those whose state nobody has been told of, the oldest first."""
        return self._select("WHERE told = 0 ORDER BY id")

    def told(self, update: Update) -> None:
        """Somebody has been told of this update's state, unless it has gone on since."""
        with self._writing():
            self._database.execute(
                "UPDATE updates SET told = 1 WHERE id = ? AND state = ?", (update.id, update.state)
            )

    def _select(self, rest: str, *values: object) -> list[Update]:
        with _translation(self.path):
            rows = self._database.execute(f"SELECT id, body, cancel FROM updates {rest}", values).fetchall()
        return [_update(*row) for row in rows]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with _translation(self.path):
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise


def _opened(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    database = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        if database.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("it is damaged")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA:
            raise sqlite3.OperationalError(f"it has version {version}, and a newer lichen wrote it")
        if version < SCHEMA:
            database.execute("BEGIN IMMEDIATE")
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'updates'").fetchone():
                database.execute(_TABLE)
            database.execute(f"PRAGMA user_version = {SCHEMA}")
            database.execute("COMMIT")
        for (body,) in database.execute("SELECT body FROM updates"):
            _update(0, body)
    except BaseException:
        database.close()
        raise
    return database


def _put_aside(path: Path) -> None:
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    for end in ("-wal", ""):  # the log first: without it nobody takes the file for whole
        part = path.with_name(path.name + end)
        if part.exists():
            part.rename(path.with_name(f"{path.name}.damaged-{stamp}{end}"))
    path.with_name(f"{path.name}-shm").unlink(missing_ok=True)


def _row(update: Update) -> tuple[str, str, str, bytes]:
    return update.slot, update.state, update.sha256, msgspec.json.encode(update)


def _update(id: int, body: bytes, cancel: int = 0) -> Update:
    try:
        return msgspec.structs.replace(msgspec.json.decode(body, type=Update), id=id, cancel=bool(cancel))
    except msgspec.DecodeError as error:
        raise sqlite3.DatabaseError(f"an update cannot be read: {error}") from error


@contextmanager
def _translation(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _translated(path, error) from error


def _translated(path: Path, error: sqlite3.Error) -> StoreError:
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
        return DiskFull(str(path.parent), 1 << 20, 0)
    return StoreError(f"The record of updates {path} cannot be used: {error}.")
