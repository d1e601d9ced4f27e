"""Learning by itself, over a real journal: jobs come of feedback, and forgetting takes them back."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from lichen.adapters import jobs
from lichen.adapters.files import FileStore
from lichen.adapters.jobs import JobStore
from lichen.adapters.lessons import survey
from lichen.adapters.policy import Decision, Rules
from lichen.adapters.records import Kept, Opinion
from lichen.adapters.registry import Registry
from lichen.adapters.thread import JournalThread
from lichen.runtime.initiative import SAID, Initiative, Options
from lichen.runtime.learning import Learning

RULES = Rules(after=3, idle=0.0, memory=1, disk=1, on_battery=True)


@asynccontextmanager
async def initiative(
    root: Path, rules: Rules | None = RULES
) -> AsyncIterator[tuple[Initiative, JournalThread]]:
    async def locate(_name: str) -> Path:
        return root / "model.gguf"

    journal = JournalThread(root / "journal.db", limit=10_000_000)
    store, files = JobStore(root / "jobs"), FileStore(root / "files", limit=1 << 20)
    store.folder.mkdir()
    learning = Learning(store, files, Registry(root / "adapters"), locate=locate, busy=lambda: False)
    learning.runs = True
    try:
        yield (
            Initiative(
                learning,
                journal,
                Options(rules=rules),
                model=lambda: "tiny",
                requests=lambda: 0,
                busy=lambda: False,
                free=lambda: 1 << 40,
            ),
            journal,
        )
    finally:
        await journal.close()


async def correct(journal: JournalThread, count: int, first: int = 0) -> list[str]:
    ids = []
    for number in range(first, first + count):
        kept = Kept(
            owner="",
            response=f"r{number}",
            choice=0,
            kind="chat",
            request={"messages": [{"role": "user", "content": f"Question {number}"}]},
            answer={"role": "assistant", "content": "No."},
            model="tiny",
        )
        opinion = Opinion(correction=f"Answer {number}")
        await journal.do(lambda opened, kept=kept: opened.keep(kept))  # type: ignore[misc]
        entry = await journal.do(
            lambda opened, kept=kept, opinion=opinion: opened.rate("", kept.response, 0, opinion)  # type: ignore[misc]
        )
        ids.append(entry.id)
    return ids


async def test_enough_feedback_becomes_a_job_once(tmp_path: Path) -> None:
    async with initiative(tmp_path) as (watch, journal):
        assert await watch.look() is None, "looking makes no journal"
        assert not journal.path.exists()
        ids = await correct(journal, 2)
        decision = await watch.look()
        assert decision is not None and "2 new lessons of the 3" in decision.sentence
        assert msgspec.json.decode((tmp_path / SAID).read_bytes(), type=Decision) == decision
        ids += await correct(journal, 1, first=2)
        decision = await watch.look()
        assert decision is not None and decision.learn
        store = JobStore(tmp_path / "jobs")
        (job,) = store.jobs()
        assert (job.model, job.name, job.status) == ("tiny", "feedback", "queued")
        report = survey(Path(job.lessons))
        assert report.lessons == 3 and report.kind == "chat"
        assert msgspec.json.decode((store.place(job.id) / jobs.RECORDS).read_bytes()) == ids
        decision = await watch.look()
        assert decision is not None and job.id in decision.sentence
        store.change(job.id, lambda found: jobs.ended(found, "failed", error="It was too much."))
        assert not Path(job.lessons).exists(), "texts stay in the journal alone"
        decision = await watch.look()
        assert decision is not None and "0 new lessons" in decision.sentence, "not the same again and again"


async def test_a_job_ends_that_would_learn_what_is_forgotten(tmp_path: Path) -> None:
    async with initiative(tmp_path) as (watch, journal):
        ids = await correct(journal, 3)
        assert (await watch.look() or Decision(False, "")).learn
        await journal.do(lambda opened: opened.forget(ids[:1]), scrub=True)
        await watch.look()
        (job,) = JobStore(tmp_path / "jobs").jobs()
        assert job.status == "cancelled" and not Path(job.lessons).exists()


async def test_off_it_makes_no_job(tmp_path: Path) -> None:
    async with initiative(tmp_path, rules=None) as (watch, journal):
        await correct(journal, 9)
        assert await watch.look() is None
    assert JobStore(tmp_path / "jobs").jobs() == [] and not (tmp_path / SAID).exists()


async def test_what_served_learns_again_without_what_was_forgotten(tmp_path: Path) -> None:
    async with initiative(tmp_path) as (watch, journal):
        ids = await correct(journal, 1)
        digest = "ab" * 32

        class Serves(Initiative):
            def _serving(self) -> str:
                return digest

        watch.__class__ = Serves
        await journal.do(lambda opened: opened.used_in(ids, digest))
        assert not (await watch.look() or Decision(True, "")).learn
        await correct(journal, 1, first=5)
        await journal.do(lambda opened: opened.forget(ids), scrub=True)
        decision = await watch.look()
        assert decision is not None and decision.learn and "forgotten" in decision.sentence
        (job,) = JobStore(tmp_path / "jobs").jobs()
        assert survey(Path(job.lessons)).lessons == 1 and job.created <= time.time()
