"""Learning by itself: looks each minute whether `adapters/policy.py` would learn, and then makes a job.

The job learns from all chats that people corrected or liked and that are still in the journal, so that the
new version replaces the old one. Also keeps the registry's marks of what learned from forgotten texts, and
ends jobs that would learn from them. Only the daemon that runs the jobs does all that.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import psutil

from lichen.adapters import jobs
from lichen.adapters.jobs import Hyperparameters, Job, new_job_id
from lichen.adapters.policy import Decision, Facts, Rules, decide
from lichen.durable import sync_folder, write_file
from lichen.errors import LichenError

if TYPE_CHECKING:
    from lichen.adapters.thread import JournalThread
    from lichen.runtime.learning import Learning

log = logging.getLogger("lichen.learning")

EVERY_S = 60.0
SAID = "policy.json"  # the last decision, beside the jobs' folder


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """rules: None where it learns only when told to. minutes: of a training. name: of the adapter."""

    rules: Rules | None = None
    minutes: float = 30.0
    name: str = "feedback"


class Initiative:
    """The looks of one daemon.

    model: name of the one that learns. requests: how many came since the start. free: bytes of memory.
    """

    def __init__(
        self,
        learning: Learning,
        journal: JournalThread,
        options: Options,
        *,
        model: Callable[[], str | None],
        requests: Callable[[], int],
        busy: Callable[[], bool],
        free: Callable[[], int],
    ) -> None:
        self._learning, self._journal, self._options = learning, journal, options
        self._model, self._requests, self._busy, self._free = model, requests, busy, free
        self._seen, self._active = -1, time.monotonic()
        self._said = learning.store.folder.parent / SAID

    async def run(self) -> None:
        """Look until cancelled."""
        if self._options.rules is None:
            await asyncio.to_thread(self._said.unlink, missing_ok=True)
        while True:
            try:
                await self.look()
            except (LichenError, OSError) as error:
                log.warning("Whether to learn cannot be decided, and is looked at again: %s", error)
            await asyncio.sleep(EVERY_S)

    async def look(self) -> Decision | None:
        """Look once; None where there is nothing to decide."""
        requests = self._requests()
        if self._busy() or requests != self._seen:
            self._seen, self._active = requests, time.monotonic()
        if not self._learning.runs or not self._journal.path.exists():
            return None
        tainted = await self._journal.do(lambda journal: journal.tainted())
        if tainted:
            await asyncio.to_thread(self._learning.registry.taint, [one.adapter for one in tainted])
        kept = await asyncio.to_thread(self._end_jobs_of_the_forgotten)
        rules, model = self._options.rules, self._model()
        if rules is None or model is None:
            return None
        facts = await self._facts(kept, {one.adapter: one.since for one in tainted})
        decision = decide(rules, facts)
        if decision.learn and not await asyncio.to_thread(self._begin, model, rules):
            decision = Decision(False, "No record of the journal is a lesson.")
        await asyncio.to_thread(self._say, decision)
        return decision

    async def _facts(self, kept: list[Job], tainted: dict[str, float]) -> Facts:
        own = [job for job in kept if job.lessons]
        last = max((job.created for job in own), default=0.0)
        lessons = await self._journal.do(lambda journal: journal.lessons_since(last))
        battery: Any = getattr(psutil, "sensors_battery", lambda: None)()
        return Facts(
            lessons=lessons,
            forgotten=tainted.get(await asyncio.to_thread(self._serving), 0.0) > last,
            working=next((job.id for job in kept if not job.ended), None),
            idle=time.monotonic() - self._active,
            plugged=None if battery is None else battery.power_plugged,
            memory=self._free(),
            disk=shutil.disk_usage(self._learning.store.folder).free,
            now=datetime.datetime.now().time(),
        )

    def _serving(self) -> str:
        name, registry = self._options.name, self._learning.registry
        return (registry.standing(name).active or "") if name in registry.names() else ""

    def _end_jobs_of_the_forgotten(self) -> list[Job]:
        """Cancel what would learn from records that are gone; all jobs."""
        from lichen.adapters.journal import Journal

        store, there = self._learning.store, None
        for job in store.jobs():
            records = store.place(job.id) / jobs.RECORDS
            if job.ended or not job.lessons or not records.exists():
                continue
            if there is None:
                with closing(Journal.open(self._journal.path)) as journal:
                    there = set(journal.all_ids())
            if not there.issuperset(msgspec.json.decode(records.read_bytes(), type=list[str])):
                log.warning("The job %s would learn from what was forgotten: it ends.", job.id)
                store.ask(job.id, "cancel")
        return store.jobs()

    def _begin(self, model: str, rules: Rules) -> bool:
        """Make a job of all lessons; False where there are none."""
        id = new_job_id()
        place = self._learning.store.place(id)
        place.mkdir(mode=0o700)
        try:
            ids = self._export(place / jobs.LESSONS)
            if not ids:
                return False
            write_file(place / jobs.RECORDS, msgspec.json.encode(ids), mode=0o600)
            sync_folder(place)
            self._learning.store.create(
                Job(
                    id=id,
                    owner="",
                    created=time.time(),
                    model=model,
                    name=self._options.name,
                    lessons=str(place / jobs.LESSONS),
                    hyperparameters=Hyperparameters(minutes=self._options.minutes),
                    memory=rules.memory,
                    disk=rules.disk,
                )
            )
        finally:
            if not (place / jobs.JOB).exists():
                shutil.rmtree(place, ignore_errors=True)
        return True

    def _export(self, path: Path) -> list[str]:
        """Write what teaches; ids of those records. On a connection of its own: it may take a while."""
        from lichen.adapters.export import line_of
        from lichen.adapters.journal import Journal

        ids = []
        path.touch(mode=0o600)
        with closing(Journal.open(self._journal.path)) as journal, path.open("wb") as file:
            for record in journal.records():
                line = line_of(record, "chat") if record.kind == "chat" else None  # one file, one kind
                if line is not None:
                    file.write(msgspec.json.encode(line) + b"\n")
                    ids.append(record.id)
        return ids

    def _say(self, decision: Decision) -> None:
        said = msgspec.json.encode(decision)
        if not self._said.exists() or self._said.read_bytes() != said:
            write_file(self._said, said)
