"""SQLite's errors as lichen's, and a damaged journal out of the way."""

from __future__ import annotations

import datetime
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from lichen.errors import JournalBusy, JournalDamaged, JournalError, JournalFull

LOCK_S = 10.0  # seconds to wait for another process that looks at a damaged file
_CANNOT_WRITE = frozenset(
    {
        sqlite3.SQLITE_IOERR_WRITE,
        sqlite3.SQLITE_IOERR_FSYNC,
        sqlite3.SQLITE_IOERR_TRUNCATE,
        sqlite3.SQLITE_IOERR_SHMSIZE,
    }
)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Raise JournalError and its kinds for what SQLite and the system raise about the file at `path`."""
    try:
        yield
    except sqlite3.Error as error:
        raise _translation(error, path) from error
    except OSError as error:
        raise JournalError(f"The journal {path} cannot be used: {error.strerror or error}.") from error


def _translation(error: sqlite3.Error, path: Path) -> JournalError:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    kind = code & 0xFF
    if kind in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return JournalDamaged(f"The journal {path} is damaged: {error}.")
    if kind == sqlite3.SQLITE_FULL or code in _CANNOT_WRITE:
        return JournalFull(
            "The journal cannot grow: the disk is full, or its bound is reached.",
            hint="Free some space, raise journal_limit, or delete records with: lichen feedback forget",
        )
    if kind in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return JournalBusy("Another process holds the journal.", hint="Try again in a moment.")
    return JournalError(f"The journal {path} cannot be used: {error}.", hint="Look at its folder's rights.")


def put_aside(path: Path) -> Path | None:
    """Rename a damaged journal, so that a new one can begin; its new place, or None if it is sound.

    Of several processes that come to it, one renames it and the others find a sound one or none. Whoever
    has the old file open sees by `Journal.in_place` that it is not the journal any more.
    """
    from filelock import FileLock, Timeout

    with translated(path):
        try:
            with FileLock(f"{path}.lock", timeout=LOCK_S, mode=0o600):
                if not path.exists() or _sound(path):
                    return None
                stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%fZ")
                aside = path.with_name(f"{path.name}.damaged-{stamp}")
                for end in ("-wal", ""):  # the log first: without it nobody takes the file for whole
                    part = path.with_name(path.name + end)
                    if part.exists():
                        part.rename(aside.with_name(aside.name + end))
                path.with_name(path.name + "-shm").unlink(missing_ok=True)
                return aside
        except Timeout as error:
            raise JournalBusy("Another process looks at the damaged journal.", hint="Try again.") from error


def _sound(path: Path) -> bool:
    try:
        with closing(sqlite3.connect(path, timeout=LOCK_S, isolation_level=None)) as connection:
            return bool(connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok")
    except sqlite3.OperationalError:
        raise  # busy or out of reach is not damaged
    except sqlite3.DatabaseError:
        return False
