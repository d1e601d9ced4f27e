"""The journal's tables, and how an older file becomes a newer one: forward only, in one transaction.

MIGRATIONS[n] makes version n + 1 out of version n; a release never changes one that was released. The
version stands in SQLite's `user_version`, and APPLICATION_ID tells a journal from a stranger's database.
A sample of every version lies in `tests/adapters/samples/`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from lichen.errors import JournalError

APPLICATION_ID = 0x4C63684A  # "LchJ"
PAGE = 4096  # bytes

# Small columns come before the texts, so that a listing does not walk through their overflow pages.
_VERSION_1 = """
CREATE TABLE records (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    response TEXT NOT NULL,
    choice INTEGER NOT NULL,
    created REAL NOT NULL,
    source TEXT NOT NULL CHECK (source IN ('served', 'app')),
    kind TEXT NOT NULL CHECK (kind IN ('chat', 'text')),
    model TEXT NOT NULL,
    model_sha256 TEXT NOT NULL,
    rated REAL,
    rating INTEGER CHECK (rating IN (-1, 1)),
    tags TEXT NOT NULL DEFAULT '[]',
    correction TEXT,
    request TEXT NOT NULL,
    answer TEXT NOT NULL,
    UNIQUE (owner, response, choice)
) STRICT;
CREATE INDEX unrated ON records (seq) WHERE rated IS NULL;
CREATE TABLE lineage (
    adapter TEXT NOT NULL,
    lesson TEXT NOT NULL,
    PRIMARY KEY (adapter, lesson)
) STRICT, WITHOUT ROWID;
CREATE INDEX lineage_of_lesson ON lineage (lesson);
CREATE TABLE forgotten (lesson TEXT PRIMARY KEY, since REAL NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE tainted (adapter TEXT PRIMARY KEY, since REAL NOT NULL) STRICT, WITHOUT ROWID;
"""

# NULL: not known. The index holds all that counting ratings needs, so that no text is walked through for it.
_VERSION_2 = """
ALTER TABLE records ADD COLUMN adapter TEXT;
ALTER TABLE records ADD COLUMN adapter_sha256 TEXT;
CREATE INDEX rated_adapters ON records (adapter_sha256, adapter, model_sha256, rating)
    WHERE rating IS NOT NULL;
"""

MIGRATIONS: tuple[str, ...] = (_VERSION_1, _VERSION_2)


def migrate(connection: sqlite3.Connection, migrations: Sequence[str] = MIGRATIONS) -> None:
    """Bring an open file to the newest version; an empty one becomes a journal.

    Must run outside a transaction. Raises JournalError for a file of a newer lichen or of another
    program, which is left as it is, and sqlite3.Error.
    """
    if _version(connection) == len(migrations):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statements in migrations[_version(connection) :]:  # another process may have done it meanwhile
            for statement in filter(str.strip, statements.split(";")):
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(migrations)}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def check_ours(connection: sqlite3.Connection, newest: int = len(MIGRATIONS)) -> None:
    """Raise JournalError for a database that another program or a newer lichen wrote."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != APPLICATION_ID and tables:
        raise JournalError(
            "The file at the journal's place is another program's database.",
            hint="Move it away, or set LICHEN_HOME to another folder.",
        )
    version = _version(connection)
    if version > newest:
        raise JournalError(
            f"The journal was written by a newer lichen (version {version} of its tables; this one knows "
            f"{newest}).",
            hint="Update lichen; the journal was left as it is.",
        )


def _version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)
