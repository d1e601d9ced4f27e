"""`/v1/feedback`: what people say of answers, acknowledged once it is durable; a key sees only its own."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from lichen.adapters.records import Entry, Kept, Opinion
from lichen.adapters.thread import JournalThread
from lichen.errors import JournalOff, NotKept
from lichen.runtime.http.journal_schema import (
    FeedbackBody,
    FeedbackDeleted,
    FeedbackList,
    FeedbackQuery,
    feedback_object,
    feedback_record,
    parse_query,
)
from lichen.runtime.http.keeping import asker
from lichen.runtime.http.openai import read
from lichen.runtime.metrics import ProcessMetrics

if TYPE_CHECKING:  # the journal's thread imports SQLite once it is needed
    from lichen.adapters.journal import Journal
    from lichen.adapters.registry import Registry


class FeedbackRoutes:
    """The handlers. journal: None where this daemon keeps nothing. registry: of the adapters that learn."""

    def __init__(
        self, journal: JournalThread | None, metrics: ProcessMetrics, registry: Registry | None
    ) -> None:
        self._journal = journal
        self._metrics = metrics
        self._registry = registry

    def routes(self) -> list[web.RouteDef]:
        """Route table for `Application.add_routes`."""
        return [
            web.post("/v1/feedback", self.rate),
            web.get("/v1/feedback", self.listing),
            web.get("/v1/feedback/{id}", self.record),
            web.delete("/v1/feedback/{id}", self.forget),
        ]

    async def rate(self, request: web.Request) -> web.Response:
        """Take an opinion on an answer."""
        body: FeedbackBody = await read(request, FeedbackBody)
        body.check()
        owner = asker()
        response = body.response_id or f"app-{secrets.token_hex(12)}"
        opinion = Opinion(
            rating=body.rating,
            correction=body.correction,
            tags=None if body.tags is None else tuple(dict.fromkeys(body.tags)),
        )

        def work(journal: Journal) -> Entry:
            try:
                return journal.rate(owner, response, body.choice, opinion)
            except NotKept:
                if body.messages is None:
                    raise
                journal.keep(_said_by_the_app(body, owner, response))
                return journal.rate(owner, response, body.choice, opinion)

        entry = await opened(self._journal).do(work, size=request.content_length or 0)
        self._metrics.feedback[body.rating or "none"] += 1
        return struct_response(feedback_object(entry))

    async def listing(self, request: web.Request) -> web.Response:
        """The records of the key that asks."""
        wanted, owner = parse_query(request.query, FeedbackQuery), asker()
        found = await opened(self._journal).do(
            lambda journal: journal.entries(owner, after=wanted.after, limit=wanted.limit + 1)
        )
        shown = [feedback_object(entry) for entry in found[: wanted.limit]]
        return struct_response(FeedbackList(object="list", data=shown, has_more=len(found) > wanted.limit))

    async def record(self, request: web.Request) -> web.Response:
        """One record with its texts."""
        id, owner = request.match_info["id"], asker()
        body = await opened(self._journal).do(
            lambda journal: msgspec.json.encode(feedback_record(journal.get(id, owner)))
        )
        return web.Response(body=body, content_type="application/json")

    async def forget(self, request: web.Request) -> web.Response:
        """Delete one record, and taint whatever learned from it; answered when no byte of it is left in the
        journal's files."""
        id, owner = request.match_info["id"], asker()

        def work(journal: Journal) -> tuple[str, ...]:
            return journal.forget([journal.get(id, owner).id], owner).adapters

        adapters = await opened(self._journal).do(work, scrub=True)
        await tainted(self._registry, adapters)
        return struct_response(
            FeedbackDeleted(id=id, object="feedback.deleted", deleted=True, tainted_adapters=list(adapters))
        )


async def tainted(registry: Registry | None, adapters: tuple[str, ...]) -> None:
    """Mark versions that learned from what is gone now, so that none of them is promoted again."""
    if adapters and registry is not None:
        await asyncio.to_thread(registry.taint, adapters)


def opened(journal: JournalThread | None) -> JournalThread:
    """The journal. Raises JournalOff where there is none."""
    if journal is None:
        raise JournalOff("This daemon keeps no feedback and no files.", hint="Start it with --journal ask.")
    return journal


def struct_response(body: msgspec.Struct) -> web.Response:
    """A 200 with a struct as JSON."""
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")


def _said_by_the_app(body: FeedbackBody, owner: str, response: str) -> Kept:
    assert body.messages is not None, "check() lets messages and answer come only together"
    return Kept(
        owner=owner,
        response=response,
        choice=body.choice,
        kind="chat",
        request={"messages": [message.plain() for message in body.messages]},
        answer={"role": "assistant", "content": body.answer},
        model=body.model or "",
        source="app",
    )
