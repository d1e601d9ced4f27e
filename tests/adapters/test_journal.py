"""The journal's file: what it keeps, what it forgets, what it survives."""

from __future__ import annotations

import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lichen.adapters.journal import Journal
from lichen.adapters.records import NOBODY, Kept, Opinion, Rating
from lichen.adapters.schema import MIGRATIONS, migrate
from lichen.adapters.sqlite_errors import put_aside
from lichen.errors import (
    JournalBusy,
    JournalDamaged,
    JournalError,
    JournalFull,
    NotFound,
    NotKept,
    PayloadTooLarge,
)

SAMPLES = Path(__file__).parent / "samples"


def kept(response: str = "chatcmpl-1", owner: str = NOBODY, **fields: Any) -> Kept:
    """An answer of a chat."""
    values: dict[str, Any] = {
        "owner": owner,
        "response": response,
        "choice": 0,
        "kind": "chat",
        "model": "moss",
        "request": {"messages": [{"role": "user", "content": "What is moss?"}]},
        "answer": {"role": "assistant", "content": "A bird."},
        **fields,
    }
    return Kept(**values)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "journal.db"


def open_journal(path: Path, **options: Any) -> Any:
    return closing(Journal.open(path, **options))


def test_an_answer_is_kept_rated_corrected_and_read(path: Path) -> None:
    with open_journal(path) as journal:
        with journal.writing():
            id = journal.keep(kept(model_sha256="ab", created=5.0))
            assert journal.keep(kept(answer={"content": "changed"})) == id, "kept once"
            entry = journal.rate(NOBODY, "chatcmpl-1", 0, Opinion(rating="down", tags=("fact",)))
        assert (entry.rating, entry.corrected, entry.tags, entry.created) == ("down", False, ("fact",), 5.0)
        with journal.writing():
            journal.rate(NOBODY, "chatcmpl-1", 0, Opinion(correction="A plant."))
    with open_journal(path) as journal:
        record = journal.get(id)
        assert (record.rating, record.correction, record.tags) == ("down", "A plant.", ("fact",))
        assert record.answer["content"] == "A bird."
        assert record.request["messages"][0]["content"] == "What is moss?"
        assert record.rated is not None
        assert abs(record.rated - time.time()) < 60
        assert journal.count() == (1, 1)
        assert list(journal.records()) == [record]
        with pytest.raises(NotKept, match='"store": true'), journal.writing():
            journal.rate(NOBODY, "chatcmpl-2", 0, Opinion(rating="up"))
        with pytest.raises(NotKept), journal.writing():
            journal.rate(NOBODY, "chatcmpl-1", 1, Opinion(rating="up"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_listing_goes_page_by_page(path: Path) -> None:
    with open_journal(path) as journal:
        with journal.writing():
            ids = [journal.keep(kept(f"r{n}", owner="key_a" if n % 2 else "key_b")) for n in range(10)]
        assert [entry.id for entry in journal.entries(limit=3)] == ids[:-4:-1]
        assert [entry.id for entry in journal.entries(after=ids[7], limit=2)] == [ids[6], ids[5]]
        assert [entry.id for entry in journal.entries("key_a")] == ids[9::-2]
        with pytest.raises(NotFound):
            journal.entries("key_a", after=ids[0])


def test_a_key_sees_and_forgets_only_its_own(path: Path) -> None:
    with open_journal(path) as journal:
        with journal.writing():
            mine = journal.keep(kept("r", owner="key_a"))
            theirs = journal.keep(kept("r", owner="key_b"))
        assert mine != theirs, "one response id may come from two keys"
        with journal.writing():
            journal.rate("key_a", "r", 0, Opinion(rating="up"))
        assert journal.get(theirs).rating is None
        with pytest.raises(NotFound):
            journal.get(theirs, "key_a")
        for names in ([theirs], [mine, theirs]):
            with pytest.raises(NotFound, match=theirs), journal.writing():
                journal.forget(names, "key_a")
        assert journal.count() == (2, 1), "nothing of a refused deletion is done"
        with journal.writing():
            assert journal.forget(["r"], "key_a").ids == (mine,)
        assert journal.get(theirs)


def test_what_is_undone_was_never_there(path: Path) -> None:
    with open_journal(path) as journal:
        with pytest.raises(ZeroDivisionError), journal.writing():
            journal.keep(kept("a"))
            raise ZeroDivisionError
        with journal.writing():
            journal.keep(kept("b"))
            with pytest.raises(ZeroDivisionError), journal.step():
                journal.keep(kept("c"))
                raise ZeroDivisionError
        assert [entry.response for entry in journal.entries()] == ["b"]


# Forgetting


def bytes_of(path: Path) -> bytes:
    """Everything that lies beside the journal, its own files included."""
    return b"".join(file.read_bytes() for file in sorted(path.parent.iterdir()) if file.is_file())


def test_no_byte_of_a_forgotten_text_is_left(path: Path) -> None:
    secret = "the lichen on the north wall of the mill"
    with open_journal(path) as journal:
        with journal.writing():
            for n in range(300):  # sizes that split and move pages
                text = f"{secret} {n} " + "x" * (n * 37 % 9000)
                question = [{"role": "user", "content": text if n % 3 else "moss"}]
                journal.keep(kept(f"r{n}", request={"messages": question}))
        for n in range(0, 300, 2):
            with journal.writing():
                journal.rate(NOBODY, f"r{n}", 0, Opinion(correction=f"{secret}! {n}" + "y" * (n * 11 % 5000)))
        with journal.writing():  # what is overwritten must not stay either
            for n in range(0, 300, 2):
                journal.rate(NOBODY, f"r{n}", 0, Opinion(correction="short"))
        assert secret.encode() in bytes_of(path), "else this test says nothing"
        with journal.writing():
            journal.forget([f"r{n}" for n in range(300) if n % 3])
            assert journal.keep(kept("stays"))
        journal.scrub()
        assert secret.encode() not in bytes_of(path)
        assert len(bytes_of(path)) < 200_000
        assert journal.count()[0] == 101


def test_a_reader_delays_the_scrub_and_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lichen.adapters.journal.BUSY_S", 0.2)
    with open_journal(path, busy_s=0.2) as journal:
        with journal.writing():
            id = journal.keep(kept("r"))
        with closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM records").fetchall()
            with journal.writing():
                journal.forget([id])
            with pytest.raises(JournalBusy, match="still reads"):
                journal.scrub()
        journal.scrub()
        assert b"What is moss" not in bytes_of(path)


def test_an_adapter_that_learned_from_it_is_tainted(path: Path) -> None:
    with open_journal(path) as journal:
        with journal.writing():
            ids = [journal.keep(kept(f"r{n}")) for n in range(4)]
            journal.used_in(ids[:2], "sha-a")
            journal.used_in([ids[1], "file-1"], "sha-b")
            journal.used_in([ids[3]], "sha-c")
        assert journal.tainted() == []
        with journal.writing():
            assert journal.forget([ids[1], ids[2]]).adapters == ("sha-a", "sha-b")
            assert journal.forget_lessons(["file-1", "file-2"]) == ("sha-b",)
        assert [(taint.adapter, taint.lessons) for taint in journal.tainted()] == [("sha-a", 1), ("sha-b", 2)]
        assert journal.lessons_of("sha-b") == sorted([ids[1], "file-1"])
        with journal.writing():  # it was trained while somebody deleted what it learned from
            journal.used_in([ids[0], ids[2]], "sha-d")
        assert "sha-d" in [taint.adapter for taint in journal.tainted()]
        assert journal.all_ids() == [ids[0], ids[3]]


# What goes wrong


@pytest.mark.parametrize(
    "content",
    [b"not a database at all" * 100, b"SQLite format 3\0" + b"\xff" * 5000, random.Random(1).randbytes(8192)],
)
def test_a_damaged_file_is_said_and_put_aside(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(JournalDamaged, match=r"journal\.db is damaged"):
        Journal.open(path)
    assert path.read_bytes() == content, "opening changes nothing"
    aside = put_aside(path)
    assert aside is not None
    assert aside.name.startswith("journal.db.damaged-")
    assert aside.read_bytes() == content
    assert put_aside(path) is None
    with open_journal(path) as journal, journal.writing():
        journal.keep(kept())
    assert put_aside(path) is None, "a sound one stays"


def test_pages_that_were_overwritten_are_noticed(path: Path) -> None:
    with open_journal(path) as journal, journal.writing():
        for n in range(200):
            journal.keep(kept(f"r{n}"))
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * 20_000)
    with pytest.raises(JournalDamaged):
        Journal.open(path)
    assert put_aside(path) is not None


def test_an_empty_file_becomes_a_journal(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    with open_journal(path) as journal:
        assert journal.count() == (0, 0)


def test_a_strangers_and_a_newer_file_are_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE recipes (name TEXT)")
        other.commit()
    before = path.read_bytes()
    with pytest.raises(JournalError, match="another program"):
        Journal.open(path)
    assert path.read_bytes() == before
    path.unlink()
    Journal.open(path).close()
    with closing(sqlite3.connect(path)) as newer:
        newer.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(JournalError, match="newer lichen"):
        Journal.open(path)


def test_a_place_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "journal.db", tmp_path):
        with pytest.raises(JournalError, match="cannot be used"):
            Journal.open(place)


def test_the_bound_holds_and_what_nobody_rated_makes_room(path: Path) -> None:
    limit = 1_000_000
    text = {"role": "assistant", "content": "m" * 20_000}
    with open_journal(path, limit=limit) as journal:
        with journal.writing():
            journal.keep(kept("rated", answer=text))
            journal.rate(NOBODY, "rated", 0, Opinion(rating="up"))
        with pytest.raises(JournalFull, match="bound"):
            for n in range(100):
                with journal.writing():
                    journal.keep(kept(f"r{n}", answer=text))
        assert path.stat().st_size <= limit
        assert journal.make_room()
        with journal.writing():
            journal.keep(kept("new", answer=text))
        left = [entry.response for entry in journal.entries(limit=1000)]
        assert "rated" in left
        assert "r0" not in left
        with pytest.raises(PayloadTooLarge, match="a quarter"), journal.writing():
            journal.keep(kept("huge", answer={"content": "m" * (limit // 4)}))


def test_another_process_that_writes_is_waited_for_and_then_said(path: Path) -> None:
    with open_journal(path, busy_s=0.1) as journal, closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(JournalBusy, match="holds the journal"), journal.writing():
            journal.keep(kept())
        other.rollback()
        with journal.writing():
            journal.keep(kept())


WRITER = """
import sys
from pathlib import Path
from lichen.adapters.journal import Journal
from lichen.adapters.records import Kept
journal = Journal.open(Path(sys.argv[1]))
for n in range(40):
    with journal.writing():
        journal.keep(Kept(owner=sys.argv[2], response=str(n), choice=0, kind="text", model="m",
                          request={"prompt": "p"}, answer={"text": "t"}))
"""


def test_processes_that_write_at_the_same_time_lose_nothing(path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), f"w{n}"]) for n in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    with open_journal(path) as journal:
        assert journal.count() == (120, 0)


# Ratings of a version


def test_ratings_are_counted_of_what_answered(path: Path) -> None:
    given: list[tuple[str | None, str | None, str, Rating | None]] = [
        ("mine", "v1", "m", "up"),
        ("mine", "v1", "m", "up"),
        ("mine", "v1", "other", "up"),
        ("mine", "v1", "m", None),
        ("mine", "v2", "m", "down"),
        ("yours", "v1", "m", "down"),
        ("", "", "m", "down"),
        ("mine", "", "", "up"),  # after a rollback, by a model that nobody has hashed
        (None, None, "m", "down"),  # what an app said, and what came before lichen kept this
    ]
    with open_journal(path) as journal:
        with journal.writing():
            for number, (adapter, digest, model, rating) in enumerate(given):
                about: dict[str, Any] = {"adapter": adapter, "adapter_sha256": digest, "model_sha256": model}
                journal.keep(kept(response=str(number), **about))
                if rating is not None:
                    journal.rate("", str(number), 0, Opinion(rating=rating))
        assert journal.ratings("mine", "v1") == (3, 0)
        assert journal.ratings("mine", "v1", model="m") == (2, 0)
        assert journal.ratings("mine", "v2") == (0, 1)
        assert journal.ratings(None, "", model="m") == (1, 1)
        with journal.writing():
            journal.rate("", "0", 0, Opinion(rating="down"))
            journal.forget(["1"])
        assert journal.ratings("mine", "v1", model="m") == (0, 1), "what is said last counts"
        record = journal.get(journal.entries()[-2].id)
        assert (record.adapter, record.adapter_sha256) == ("mine", "v1")
        plan = journal._run(
            "EXPLAIN QUERY PLAN SELECT sum(rating = 1) FROM records WHERE adapter_sha256 = 'v1' "
            "AND rating IS NOT NULL AND adapter = 'mine'"
        ).fetchall()
        assert "COVERING INDEX rated_adapters" in str(plan), "no text is walked through"


# Older files


def test_there_is_a_sample_of_every_version() -> None:
    assert sorted(sample.name for sample in SAMPLES.glob("journal-*")) == [
        f"journal-v{n}.db" for n in range(1, len(MIGRATIONS) + 1)
    ]


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS) + 1))
def test_a_journal_of_every_version_still_opens(path: Path, version: int) -> None:
    path.parent.mkdir()
    shutil.copy(SAMPLES / f"journal-v{version}.db", path)
    with open_journal(path) as journal:
        rated, unrated = sorted(journal.records(), key=lambda record: record.response)
        assert (rated.rating, rated.correction, rated.tags) == ("down", "A plant.", ("fact", "botany"))
        assert rated.request["messages"][0]["content"] == "What is moss?"
        assert (rated.adapter, rated.adapter_sha256) == (
            (None, None) if version == 1 else ("botany", "ab" * 32)
        )
        assert (unrated.kind, unrated.rating, unrated.answer) == ("text", None, {"text": " 3"})
        assert [taint.adapter for taint in journal.tainted()] == ["sha-of-an-adapter"]
        with journal.writing():
            journal.rate(unrated.owner, unrated.response, 0, Opinion(rating="up"))
    with open_journal(path.with_name("fresh.db")) as fresh:
        assert tables(path) == tables(fresh.path)


def tables(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as connection:
        return {sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL")}


def test_a_migration_is_whole_or_not_at_all(path: Path) -> None:
    Journal.open(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        good, bad = (
            "ALTER TABLE records ADD COLUMN mood TEXT",
            "CREATE TABLE moods (name TEXT); CREATE NONSENSE",
        )
        with pytest.raises(sqlite3.OperationalError):
            migrate(connection, [*MIGRATIONS, good, bad])
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        assert "mood" not in "".join(tables(path))
        migrate(connection, [*MIGRATIONS, good])
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS) + 1,)
        migrate(connection, [*MIGRATIONS, good])  # nothing is done twice
    with pytest.raises(JournalError, match="newer"):
        Journal.open(path)
