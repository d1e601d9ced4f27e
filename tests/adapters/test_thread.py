"""The journal's thread: what is answered is durable, in order, and whatever fails disturbs nobody else."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lichen.adapters import thread as thread_module
from lichen.adapters.journal import Journal
from lichen.adapters.records import NOBODY, Opinion
from lichen.adapters.thread import JournalThread
from lichen.errors import JournalBusy, JournalFull, NotFound, NotKept
from tests.adapters.test_journal import bytes_of, kept


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[JournalThread]:
    made = JournalThread(tmp_path / "home" / "journal.db", limit=10_000_000)
    yield made
    await made.close()


def read(path: Path) -> list[str]:
    with closing(Journal.open(path)) as journal:
        return [entry.response for entry in journal.entries(limit=10_000)]


async def test_nothing_is_made_before_it_is_needed(journal: JournalThread) -> None:
    before = threading.active_count()
    assert not journal.path.parent.exists()
    await journal.close()
    assert threading.active_count() == before
    with pytest.raises(JournalBusy):
        await journal.do(Journal.count)


async def test_many_share_a_commit_and_come_in_order(
    journal: JournalThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = 0
    really = thread_module._commit

    def counted(*arguments: Any) -> Any:
        nonlocal commits
        commits += 1
        return really(*arguments)

    monkeypatch.setattr(thread_module, "_commit", counted)
    hold = threading.Event()
    first = asyncio.ensure_future(journal.do(lambda _: hold.wait(5)))
    await asyncio.sleep(0.05)
    told: list[Any] = []
    for n in range(100):
        keep = functools.partial(Journal.keep, kept=kept(f"r{n}"))
        journal.post(keep, size=10, told=lambda value, _: told.append(value))
    up = Opinion(rating="up")
    rated = [
        journal.do(functools.partial(Journal.rate, owner=NOBODY, response=f"r{n}", choice=0, opinion=up))
        for n in range(100)
    ]
    missing = journal.do(lambda j: j.rate(NOBODY, "none", 0, Opinion(rating="up")))
    waiting = asyncio.gather(*rated, missing, return_exceptions=True)
    await asyncio.sleep(0)
    hold.set()
    results = await waiting
    assert isinstance(results[-1], NotKept), "one that fails does not take the others along"
    assert all(entry.rating == "up" for entry in results[:-1] if not isinstance(entry, BaseException))
    assert await first
    assert len(told) == 100
    assert commits <= 4
    assert len(read(journal.path)) == 100


async def test_the_loop_stays_free_while_the_disk_is_slow(journal: JournalThread) -> None:
    slow = asyncio.ensure_future(journal.do(lambda _: time.sleep(1.0)))
    longest, last = 0.0, time.monotonic()
    while not slow.done():
        await asyncio.sleep(0.005)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    assert longest < 0.7


async def test_a_deletion_is_answered_when_no_byte_is_left(journal: JournalThread) -> None:
    id = await journal.do(lambda j: j.keep(kept("r", answer={"content": "the secret moss"})))
    assert b"the secret moss" in bytes_of(journal.path)
    await journal.do(lambda j: j.forget([id]), scrub=True)
    assert b"the secret moss" not in bytes_of(journal.path)
    with pytest.raises(NotFound):
        await journal.do(lambda j: j.forget([id]), scrub=True)


async def test_a_damaged_file_is_put_aside_and_serving_goes_on(
    journal: JournalThread, caplog: pytest.LogCaptureFixture
) -> None:
    journal.path.parent.mkdir()
    journal.path.write_bytes(b"rubbish" * 1000)
    with caplog.at_level(logging.ERROR, "lichen.journal"):
        assert await journal.do(lambda j: j.keep(kept("after")))
    (line,) = caplog.messages
    assert "is damaged" in line
    assert "a new journal was begun" in line
    (aside,) = journal.path.parent.glob("journal.db.damaged-*")
    assert aside.read_bytes() == b"rubbish" * 1000
    assert read(journal.path) == ["after"]


async def test_damage_while_it_is_open_is_noticed(journal: JournalThread) -> None:
    await journal.do(lambda j: [j.keep(kept(f"r{n}")) for n in range(200)])
    with closing(Journal.open(journal.path)) as other:
        other._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with journal.path.open("r+b") as file:
            file.seek(4096)
            file.write(b"\xa5" * 40_000)
        assert await journal.do(lambda j: j.keep(kept("after")))
        assert await journal.do(lambda j: j.entries(limit=1000))
    assert read(journal.path) == ["after"]
    assert len(list(journal.path.parent.glob("journal.db.damaged-*Z"))) == 1


async def test_a_file_that_was_moved_away_is_noticed_before_the_answer(journal: JournalThread) -> None:
    await journal.do(lambda j: j.keep(kept("before")))

    def moved_while_written(j: Journal) -> None:
        j.keep(kept("during"))
        if not moved.exists():
            for end in ("", "-wal"):
                j.path.with_name(j.path.name + end).rename(moved.with_name(moved.name + end))

    moved = journal.path.with_name("moved.db")
    await journal.do(moved_while_written)
    assert read(journal.path) == ["during"], "it is in the file that is the journal now"


async def test_past_the_bound_a_clear_error_and_the_rest_goes_on(tmp_path: Path) -> None:
    journal = JournalThread(tmp_path / "journal.db", limit=400_000)
    text = {"content": "m" * 40_000}

    def rated(name: str) -> Any:
        def work(j: Journal) -> Any:
            j.keep(kept(name, answer=text))
            return j.rate(NOBODY, name, 0, Opinion(rating="up"))

        return work

    results = await asyncio.gather(
        *(journal.do(rated(f"r{n}")) for n in range(20)), journal.do(Journal.count), return_exceptions=True
    )
    full = [result for result in results if isinstance(result, JournalFull)]
    assert 5 < len(full) < 20
    assert "journal_limit" in str(full[0])
    assert results[-1] == (20 - len(full), 20 - len(full)), "exactly what was answered is there"
    await journal.do(lambda j: j.forget(["r0", "r1"]), scrub=True)
    assert await journal.do(rated("again"))
    await journal.close()


async def test_answers_that_nobody_rated_make_room(tmp_path: Path) -> None:
    journal = JournalThread(tmp_path / "journal.db", limit=1_000_000)
    errors: list[Any] = []
    for n in range(100):
        work = functools.partial(Journal.keep, kept=kept(f"r{n}", answer={"content": "m" * 30_000}))
        journal.post(work, size=30_000, told=lambda _, error: errors.append(error))
        await asyncio.sleep(0)
    await journal.do(Journal.count)
    await journal.close()
    assert errors == [None] * 100
    assert "r99" in read(journal.path)
    assert "r0" not in read(journal.path)


async def test_what_waits_is_bounded(journal: JournalThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_module, "MAX_BYTES", 1000)
    hold = threading.Event()
    first = asyncio.ensure_future(journal.do(lambda _: hold.wait(5)))
    await asyncio.sleep(0.05)
    journal.post(lambda j: j.keep(kept("r")), size=900, told=lambda *_: None)
    with pytest.raises(JournalBusy, match="Try again"):
        journal.post(lambda j: j.keep(kept("r")), size=200, told=lambda *_: None)
    hold.set()
    await first
    await journal.do(Journal.count)
    journal.post(lambda j: j.keep(kept("later")), size=900, told=lambda *_: None)
    await journal.do(Journal.count)
    assert read(journal.path) == ["later", "r"]


async def test_who_asked_and_left_disturbs_nobody(journal: JournalThread) -> None:
    gone = asyncio.ensure_future(journal.do(lambda j: time.sleep(0.1)))
    await asyncio.sleep(0.02)
    gone.cancel()
    assert await journal.do(Journal.count) == (0, 0)
    with pytest.raises(ZeroDivisionError):
        await journal.do(lambda _: 1 // 0)
    assert await journal.do(Journal.count) == (0, 0)
