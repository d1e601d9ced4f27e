"""OpenAI's fine-tuning API: `/v1/fine_tuning/jobs`. A key sees only its own jobs."""

from __future__ import annotations

import asyncio
import functools
import re
import time
from collections.abc import Callable
from typing import TypeVar

from aiohttp import web

from lichen.adapters.events import Stepped, Told, told
from lichen.adapters.files import FileStore, StoredFile
from lichen.adapters.jobs import Job, Wish, new_job_id
from lichen.adapters.launch import EVENTS
from lichen.errors import JournalOff, NotFound, RequestError
from lichen.runtime.http.daemon_learning import DaemonLearning
from lichen.runtime.http.feedback import struct_response
from lichen.runtime.http.fine_tuning_schema import (
    CheckpointList,
    EventList,
    JobBody,
    JobList,
    JobObject,
    JobsQuery,
    event_object,
    hyperparameters,
    job_object,
)
from lichen.runtime.http.journal_schema import parse_query
from lichen.runtime.http.keeping import asker
from lichen.runtime.http.openai import read

T = TypeVar("T")
_EVENT = re.compile(r"ftevent-[0-9]{8}")


class FineTuningRoutes:
    """The handlers. learning, files: None where this daemon learns nothing."""

    def __init__(self, learning: DaemonLearning | None, files: FileStore | None) -> None:
        self._learning, self._files = learning, files

    def routes(self) -> list[web.RouteDef]:
        """Route table for `Application.add_routes`."""
        return [
            web.post("/v1/fine_tuning/jobs", self.create),
            web.get("/v1/fine_tuning/jobs", self.listing),
            web.get("/v1/fine_tuning/jobs/{id}", self.job),
            web.post("/v1/fine_tuning/jobs/{id}/cancel", functools.partial(self.ask, wish="cancel")),
            web.post("/v1/fine_tuning/jobs/{id}/pause", functools.partial(self.ask, wish="pause")),
            web.post("/v1/fine_tuning/jobs/{id}/resume", functools.partial(self.ask, wish="resume")),
            web.get("/v1/fine_tuning/jobs/{id}/events", self.events),
            web.get("/v1/fine_tuning/jobs/{id}/checkpoints", self.checkpoints),
        ]

    async def create(self, request: web.Request) -> web.Response:
        """Take a job in; answered once it is durable."""
        learning, files = self._opened()
        body: JobBody = await read(request, JobBody)
        body.check()
        asked, owner = body.how.asked(), asker()
        model = await learning.adaptable(body.model)
        training = await self._off_loop(
            functools.partial(_file, files, body.training_file, owner, "training")
        )
        if body.validation_file is not None:
            await self._off_loop(functools.partial(_file, files, body.validation_file, owner, "validation"))
        if (training.kind == "preference") != (body.how.type == "dpo"):
            raise RequestError(
                f"The file holds lessons of the kind {training.kind}, from which the method {body.how.type} "
                "cannot learn.",
                param="method",
            )
        id = new_job_id()
        job = Job(
            id=id,
            owner=owner,
            created=time.time(),
            model=model,
            name=body.suffix or f"ft-{id[-8:]}",
            training=body.training_file,
            validation=body.validation_file or "",
            objective="preference" if body.how.type == "dpo" else "supervised",
            hyperparameters=hyperparameters(asked),
            seed=body.seed or 0,
            metadata=body.metadata or {},
        )
        return struct_response(
            job_object(await self._off_loop(functools.partial(learning.store.create, job)))
        )

    async def listing(self, request: web.Request) -> web.Response:
        """The jobs of the key that asks."""
        store = self._opened()[0].store
        wanted = parse_query(request.query, JobsQuery)
        jobs = await self._off_loop(functools.partial(store.jobs, asker()))
        jobs = _after(jobs, wanted.after, lambda job: job.id)
        shown = [job_object(job) for job in jobs[: wanted.limit]]
        return struct_response(JobList(object="list", data=shown, has_more=len(jobs) > len(shown)))

    async def job(self, request: web.Request) -> web.Response:
        """One job."""
        job = await self._job(request)
        return struct_response(await self._off_loop(functools.partial(self._object, job)))

    async def ask(self, request: web.Request, *, wish: Wish) -> web.Response:
        """Want it to pause, to go on or to end; answered once that is durable."""
        store = self._opened()[0].store
        ask = functools.partial(store.ask, request.match_info["id"], wish, asker())
        return struct_response(job_object(await self._off_loop(ask)))

    async def events(self, request: web.Request) -> web.Response:
        """What happened in it."""
        job, wanted = await self._job(request), parse_query(request.query, JobsQuery)
        happened = await self._off_loop(functools.partial(self._told, job))
        events = [event_object(one) for one in reversed(happened)]
        if wanted.after is not None:  # one that a resumption has replaced meanwhile is a place all the same
            if not _EVENT.fullmatch(wanted.after):
                raise RequestError(f"{wanted.after[:64]!r} is no id of an event.", param="after")
            events = [event for event in events if event.id < wanted.after]
        shown = events[: wanted.limit]
        return struct_response(EventList(object="list", data=shown, has_more=len(events) > len(shown)))

    async def checkpoints(self, request: web.Request) -> web.Response:
        """None: only the result of a job is a model."""
        await self._job(request)
        return struct_response(CheckpointList(object="list", data=[], has_more=False))

    async def _job(self, request: web.Request) -> Job:
        store = self._opened()[0].store
        return await self._off_loop(functools.partial(store.get, request.match_info["id"], asker()))

    def _told(self, job: Job) -> list[Told]:
        store = self._opened()[0].store
        return told(store.place(job.id) / EVENTS)

    def _object(self, job: Job) -> JobObject:
        finish = None
        if job.status == "running":
            steps = [one.at + one.event.left for one in self._told(job) if isinstance(one.event, Stepped)]
            finish = steps[-1] if steps else None
        return job_object(job, estimated_finish=finish)

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.to_thread(work)

    def _opened(self) -> tuple[DaemonLearning, FileStore]:
        if self._learning is None or self._files is None:
            raise JournalOff(
                "This daemon keeps no files and learns nothing.", hint="Start it with --journal ask."
            )
        return self._learning, self._files


def _file(files: FileStore, id: str, owner: str, which: str) -> StoredFile:
    """What is known of an uploaded file. Raises RequestError that names the field."""
    try:
        return files.get(id, owner)
    except NotFound as error:
        raise RequestError(error.message, hint=error.hint, param=f"{which}_file") from None


def _after(items: list[T], after: str | None, id_of: Callable[[T], str]) -> list[T]:
    if after is None:
        return items
    for place, item in enumerate(items):
        if id_of(item) == after:
            return items[place + 1 :]
    raise RequestError(f"There is nothing of the id {after[:64]!r} to list after.", param="after")
