"""The feedback journal: answers that may be learned from, and what people said of them.

One SQLite file (WAL, `synchronous=FULL`): what a committed transaction holds survives `kill -9` and a power
cut. Several processes may have it open; SQLite's locks keep them apart. A `Journal` belongs to the thread
that opened it, and every method that changes something runs inside `with journal.writing():`. The daemon
goes through `thread.py`, which shares one commit, and so one fsync, between many requests.

Deleting is meant: `secure_delete` overwrites what is freed, and `scrub` rewrites the file and empties the
log of changes, so that no byte of a forgotten text is left in them. Ids of what was forgotten stay, to tell
which adapters had learned from it.

Not covered: copies of the file, blocks of a disk that its controller has moved away, and the prefix cache.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from lichen.adapters.journal_rows import ENTRY, RATINGS, RECORD, entry_of, record_of
from lichen.adapters.records import Entry, Forgotten, Kept, Opinion, Record, Tainted, new_id
from lichen.adapters.schema import PAGE, check_ours, migrate
from lichen.adapters.sqlite_errors import translated
from lichen.errors import JournalBusy, JournalDamaged, JournalFull, NotFound, NotKept, PayloadTooLarge

BUSY_S = 10.0  # seconds to wait for another process that writes
CHECKED = 64 << 20  # bytes: a file up to this size is looked through when it is opened, about 0.1 s
WAL_KEPT = 4 << 20  # bytes that the log of changes keeps on disk between checkpoints
SHARE = 4  # one record may take 1/SHARE of the bound
ROOM = 16  # making room frees 1/ROOM of the bound
DEFAULT_LIMIT = 1_000_000_000  # bytes

encode = msgspec.json.encode


class Journal:
    """One open journal. Make it with `open`. Raises JournalError and its kinds for whatever goes wrong."""

    def __init__(self, path: Path, connection: sqlite3.Connection, limit: int) -> None:
        self.path = path
        self._connection = connection
        self._limit = limit
        self._identity = _identity(path)

    @classmethod
    def open(cls, path: Path, *, limit: int = DEFAULT_LIMIT, busy_s: float = BUSY_S) -> Journal:
        """Open the file, or make it (mode 0600). limit: bytes that it may grow to.

        Raises JournalDamaged for a file that is no sound database.
        """
        with translated(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            connection = sqlite3.connect(path, timeout=busy_s, isolation_level=None)
            try:
                _prepare(connection, path, limit)
            except BaseException:
                connection.close()
                raise
        return cls(path, connection, limit)

    def close(self) -> None:
        """Close the file; idempotent."""
        with translated(self.path):
            self._connection.close()

    def in_place(self) -> bool:
        """Whether the open file is still the one at its path: another process may have put it aside."""
        return _identity(self.path) == self._identity

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction: durable once the block has ended, undone if it raises."""
        with translated(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @property
    def in_transaction(self) -> bool:
        """Whether one is open; a failing disk ends it by itself."""
        return self._connection.in_transaction

    @contextmanager
    def step(self) -> Iterator[None]:
        """Part of a transaction: if it raises, it alone is undone."""
        with translated(self.path):
            self._connection.execute("SAVEPOINT step")
            try:
                yield
            except BaseException:
                if self._connection.in_transaction:  # a full disk ends the whole transaction
                    self._connection.execute("ROLLBACK TO step")
                    self._connection.execute("RELEASE step")
                raise
            self._connection.execute("RELEASE step")

    # What is kept and said

    def keep(self, kept: Kept) -> str:
        """Keep an answer; its id. One that is there already stays as it is."""
        request, answer = encode(kept.request).decode(), encode(kept.answer).decode()
        if len(request) + len(answer) > self._limit // SHARE:
            raise PayloadTooLarge(
                f"One answer may take a quarter of the journal, {self._limit // SHARE:,} bytes.",
                hint="Raise journal_limit, or do not keep this one.",
            )
        values = msgspec.structs.asdict(kept) | {"id": new_id(), "request": request, "answer": answer}
        columns = ", ".join(values)
        self._run(
            f"INSERT INTO records ({columns}) VALUES ({', '.join(':' + name for name in values)}) "
            "ON CONFLICT (owner, response, choice) DO NOTHING",
            values,
        )
        return str(self._find(kept.owner, kept.response, kept.choice))

    def rate(self, owner: str, response: str, choice: int, opinion: Opinion) -> Entry:
        """Add an opinion to a kept answer, over what was said before. Raises NotKept."""
        found = self._find(owner, response, choice)
        if found is None:
            raise NotKept(
                f"The response {response!r} (choice {choice}) was not kept: there is nothing to learn from.",
                hint='Ask with "store": true, or send its messages and answer along with the feedback.',
                param="response_id",
            )
        self._run(
            "UPDATE records SET rated = :now, rating = coalesce(:rating, rating), "
            "correction = coalesce(:correction, correction), tags = coalesce(:tags, tags) WHERE id = :id",
            {
                "id": found,
                "now": time.time(),
                "rating": RATINGS[opinion.rating],
                "correction": opinion.correction,
                "tags": None if opinion.tags is None else encode(opinion.tags).decode(),
            },
        )
        return self.get(found)

    def get(self, id: str, owner: str | None = None) -> Record:
        """One record. owner: None for anybody's. Raises NotFound, also for somebody else's."""
        with translated(self.path):
            row = self._run(
                f"SELECT {RECORD} FROM records WHERE id = ? AND owner = coalesce(?, owner)", (id, owner)
            ).fetchone()
        if row is None:
            raise _unknown(id)
        return record_of(row)

    def entries(self, owner: str | None = None, *, after: str | None = None, limit: int = 20) -> list[Entry]:
        """Records without their texts, newest first, those after `after`. Raises NotFound for its id."""
        with translated(self.path):
            last = (1 << 62) if after is None else self._place(after, owner)
            rows = self._run(
                f"SELECT {ENTRY} FROM records WHERE seq < ? AND owner = coalesce(?, owner) "
                "ORDER BY seq DESC LIMIT ?",
                (last, owner, limit),
            ).fetchall()
        return [entry_of(row) for row in rows]

    def records(self) -> Iterator[Record]:
        """All records, oldest first, read one by one."""
        with translated(self.path):
            last = 0
            while True:
                rows = self._run(
                    f"SELECT {RECORD}, seq FROM records WHERE seq > ? ORDER BY seq LIMIT 1", (last,)
                ).fetchall()
                if not rows:
                    return
                last = rows[0][-1]
                yield record_of(rows[0][:-1])

    def count(self) -> tuple[int, int]:
        """Records, and how many of them somebody rated or corrected."""
        with translated(self.path):
            total, rated = self._run("SELECT count(*), count(rated) FROM records").fetchone()
        return total, rated

    def lessons_since(self, moment: float) -> int:
        """How many chats were corrected or liked after a time in seconds since 1970."""
        with translated(self.path):
            (count,) = self._run(
                "SELECT count(*) FROM records WHERE rated > ? AND kind = 'chat' "
                "AND (rating = 1 OR correction IS NOT NULL)",
                (moment,),
            ).fetchone()
        return int(count)

    def ratings(self, adapter: str | None, digest: str, *, model: str | None = None) -> tuple[int, int]:
        """How many answers were liked, and how many disliked, that a version of an adapter gave.

        digest: "" for the model alone. adapter: the name that was asked for, "" for none, None for any.
        model: sha256 of the model's file, None for any; answers of a file that nobody has hashed count too.
        """
        with translated(self.path):
            up, down = self._run(
                "SELECT coalesce(sum(rating = 1), 0), coalesce(sum(rating = -1), 0) FROM records "
                "WHERE adapter_sha256 = ?1 AND rating IS NOT NULL AND adapter = coalesce(?2, adapter) "
                "AND (?3 IS NULL OR model_sha256 IN (?3, ''))",
                (digest, adapter, model),
            ).fetchone()
        return int(up), int(down)

    # Forgetting

    def forget(self, names: Sequence[str], owner: str | None = None) -> Forgotten:
        """Delete records by their ids or by the ids of their responses. Call `scrub` once it is committed.

        owner: None for anybody's. Raises NotFound, also for somebody else's, and then deletes nothing.
        """
        ids: dict[str, None] = {}
        for name in names:
            rows = self._run(
                "SELECT id FROM records WHERE (id = ?1 OR response = ?1) AND owner = coalesce(?2, owner)",
                (name, owner),
            ).fetchall()
            if not rows:
                raise _unknown(name)
            ids |= dict.fromkeys(id for (id,) in rows)
        adapters = self.forget_lessons(list(ids))
        self._connection.executemany("DELETE FROM records WHERE id = ?", [(id,) for id in ids])
        return Forgotten(tuple(ids), adapters)

    def all_ids(self, *, before: float | None = None) -> list[str]:
        """Ids of everything, or of what was kept before a time in seconds since 1970."""
        with translated(self.path):
            rows = self._run(
                "SELECT id FROM records WHERE created < coalesce(?, 1e300)", (before,)
            ).fetchall()
        return [id for (id,) in rows]

    def scrub(self) -> None:
        """Leave no byte of what was deleted in the files. Takes about a second for 300 MB.

        secure_delete overwrites freed cells, but a page that was split before may hold an older copy in its
        gap; only VACUUM rewrites every page. Then the log of changes is emptied into the file and cut to 0.
        Raises JournalBusy while another process reads what was there before.
        """
        with translated(self.path):
            self._connection.execute("VACUUM")
            self._empty_log()

    def _empty_log(self) -> None:
        deadline = time.monotonic() + BUSY_S
        while True:
            (busy, _, _) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if not busy:
                return
            if time.monotonic() > deadline:
                raise JournalBusy(
                    "It is deleted, but another process still reads the journal as it was before.",
                    hint="Its text leaves the disk with the next change after that process has ended.",
                )
            time.sleep(0.05)

    def make_room(self) -> bool:
        """Drop the oldest answers that nobody rated, 1/16 of the bound; whether any went."""
        try:
            gone = 0
            while self._number("freelist_count") * PAGE < self._limit // ROOM:
                with self.writing():
                    dropped = self._run(
                        "DELETE FROM records WHERE seq IN "
                        "(SELECT seq FROM records WHERE rated IS NULL ORDER BY seq LIMIT 32)"
                    ).rowcount
                gone += dropped
                if not dropped:
                    break
            return gone > 0
        except JournalFull:  # there is no room for the log of the deletion either
            return False

    # Which adapter learned from what

    def used_in(self, ids: Sequence[str], *adapter_digests: str) -> None:
        """Note that adapters were trained on these records or files; tainted at once if one is gone."""
        for digest in adapter_digests:
            self._used_in(ids, digest)

    def _used_in(self, ids: Sequence[str], adapter_digest: str) -> None:
        self._connection.executemany(
            "INSERT OR IGNORE INTO lineage VALUES (?, ?)", [(adapter_digest, id) for id in ids]
        )
        self._run(
            "INSERT OR IGNORE INTO tainted SELECT DISTINCT adapter, ?2 FROM lineage JOIN forgotten "
            "USING (lesson) WHERE adapter = ?1",
            (adapter_digest, time.time()),
        )

    def lessons_of(self, adapter_digest: str) -> list[str]:
        """Ids that an adapter was trained on, those of forgotten ones too, sorted."""
        with translated(self.path):
            rows = self._run(
                "SELECT lesson FROM lineage WHERE adapter = ? ORDER BY lesson", (adapter_digest,)
            )
            return [lesson for (lesson,) in rows]

    def forget_lessons(self, ids: Sequence[str]) -> tuple[str, ...]:
        """Note that records or files are gone, and taint whatever learned from them; those adapters."""
        now = time.time()
        adapters: set[str] = set()
        for id in ids:
            self._run("INSERT OR IGNORE INTO forgotten VALUES (?, ?)", (id, now))
            rows = self._run("SELECT adapter FROM lineage WHERE lesson = ?", (id,))
            adapters.update(adapter for (adapter,) in rows)
        self._connection.executemany(
            "INSERT OR IGNORE INTO tainted VALUES (?, ?)", [(adapter, now) for adapter in adapters]
        )
        return tuple(sorted(adapters))

    def tainted(self) -> list[Tainted]:
        """Adapters that learned from something that was forgotten since, the longest tainted first."""
        with translated(self.path):
            rows = self._run(
                "SELECT adapter, since, (SELECT count(*) FROM lineage JOIN forgotten USING (lesson) "
                "WHERE adapter = tainted.adapter) FROM tainted ORDER BY since, adapter"
            ).fetchall()
        return [Tainted(*row) for row in rows]

    def _run(self, statement: str, values: Any = ()) -> sqlite3.Cursor:
        return self._connection.execute(statement, values)

    def _number(self, pragma: str) -> int:
        return int(self._run(f"PRAGMA {pragma}").fetchone()[0])

    def _find(self, owner: str, response: str, choice: int) -> str | None:
        row = self._run(
            "SELECT id FROM records WHERE owner = ? AND response = ? AND choice = ?",
            (owner, response, choice),
        ).fetchone()
        return None if row is None else str(row[0])

    def _place(self, id: str, owner: str | None) -> int:
        row = self._run(
            "SELECT seq FROM records WHERE id = ? AND owner = coalesce(?, owner)", (id, owner)
        ).fetchone()
        if row is None:
            raise _unknown(id)
        return int(row[0])


def _prepare(connection: sqlite3.Connection, path: Path, limit: int) -> None:
    """Check an opened file and set it up. Raises JournalDamaged, JournalError and sqlite3.Error."""
    connection.execute(f"PRAGMA page_size = {PAGE}")  # counts only before there is a table
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    check_ours(connection)
    if path.stat().st_size <= CHECKED and (fault := check(connection)) is not None:
        raise JournalDamaged(f"The journal {path} is damaged: {fault}.")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute(f"PRAGMA journal_size_limit = {WAL_KEPT}")
    connection.execute(f"PRAGMA max_page_count = {max(64, limit // PAGE)}")
    migrate(connection)


def check(connection: sqlite3.Connection) -> str | None:
    """What is wrong with a file's structure, or None. Reads all of it."""
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    return None if found == "ok" else str(found).replace("\n", " ")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino)


def _unknown(id: str) -> NotFound:
    return NotFound(f"There is no record {id!r} in the journal.", hint="'lichen feedback list' shows them.")
