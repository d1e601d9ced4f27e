"""A device's reports on their way to the collector: joining once, batches, and what each answer means.

    device.key      the device's key (key.py)
    reports.db      what has not arrived (outbox.py)

Reporting never holds up an update or an answer: `put` is one small transaction, `flush` is called from time
to time, and whatever goes wrong there leaves the reports where they are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

import lichen
from lichen.errors import FleetError, SourceError
from lichen.sync.reporting.key import DeviceKey
from lichen.sync.reporting.outbox import BOUND, Outbox
from lichen.sync.reporting.wire import (
    BATCH,
    SIGNATURE,
    Acknowledged,
    Batch,
    Joining,
    Purpose,
    UpdateReport,
    read_document,
    signature_text,
)

if TYPE_CHECKING:
    import httpx

    from lichen.sync.trust.enrolment import Enrolment

PATHS: dict[Purpose, str] = {"join": "/v1/devices", "report": "/v1/reports"}
ANSWER_LIMIT = 1 << 16  # bytes
Post = Callable[[str, bytes, str], Awaitable[tuple[int, bytes]]]
"""Sends a body and its signature to a path of the collector; status and body of the answer.
Raises SourceError where it cannot be reached."""


class Reporter:
    """Keeps and sends the reports of the device whose folder this is.

    hardware: the device's class, "" where none is known. clock: seconds since 1970.
    """

    def __init__(
        self,
        key: DeviceKey,
        outbox: Outbox,
        bundle: Enrolment,
        *,
        hardware: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.id = key.id
        self._key, self._outbox, self._bundle = key, outbox, bundle
        self._hardware, self._clock = hardware, clock

    @classmethod
    def at(cls, folder: Path, bundle: Enrolment, *, hardware: str = "") -> Reporter:
        """The reporter of the fleet's folder on this machine. Raises FleetError."""
        key, outbox = DeviceKey.at(folder / "device.key"), Outbox(folder / "reports.db")
        return cls(key, outbox, bundle, hardware=hardware)

    def close(self) -> None:
        """Close the file; idempotent."""
        self._outbox.close()

    def put(self, report: UpdateReport) -> None:
        """Keep a report until it has arrived; its sequence number is given here. Raises FleetError."""
        if self._bundle.collector is not None:
            self._outbox.put(report)

    async def flush(self, post: Post) -> int:
        """Send all that waits, at least one batch; how many reports the collector did not have before.

        An empty batch says that the device is there. Raises SourceError (try later) or FleetError (refused).
        """
        new = 0
        for _ in range(BOUND // BATCH + 2):
            reports = await asyncio.to_thread(self._outbox.waiting)
            answer = await self._send(post, self._batch(reports))
            new += answer.new
            await asyncio.to_thread(self._outbox.arrived, reports, answer.sequence)
            if not await asyncio.to_thread(self._outbox.waiting, 1):
                break
        return new

    def _batch(self, reports: tuple[UpdateReport, ...]) -> Batch:
        return Batch(
            fleet=self._bundle.fleet,
            device=self.id,
            sent=self._clock(),
            reports=reports,
            lichen=lichen.__version__,
            hardware=self._hardware,
            tags=self._bundle.tags,
            dropped=self._outbox.dropped(),
        )

    async def _send(self, post: Post, batch: Batch) -> Acknowledged:
        status, body = await self._signed(post, "report", msgspec.json.encode(batch))
        if status == 401:  # it does not know this key yet, or no more
            token = self._bundle.token or ""
            joining = Joining(fleet=self._bundle.fleet, token=token, key=self._key.public)
            _check(*await self._signed(post, "join", msgspec.json.encode(joining)))
            status, body = await self._signed(post, "report", msgspec.json.encode(batch))
        return read_document(_check(status, body), Acknowledged)

    async def _signed(self, post: Post, purpose: Purpose, body: bytes) -> tuple[int, bytes]:
        return await post(PATHS[purpose], body, signature_text(self._key.sign(purpose, body)))


def http_post(client: httpx.AsyncClient, collector: str) -> Post:
    """Posts to a collector's URL. Redirects are not followed; an answer is read up to ANSWER_LIMIT."""
    import httpx

    async def post(path: str, body: bytes, signature: str) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json", SIGNATURE: signature}
        try:
            async with client.stream(
                "POST", collector.rstrip("/") + path, content=body, headers=headers, follow_redirects=False
            ) as answer:
                got = b""
                async for part in answer.aiter_bytes():
                    got += part
                    if len(got) > ANSWER_LIMIT:
                        raise SourceError("The collector's answer does not end.")
                return answer.status_code, got
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise SourceError(
                f"The collector cannot be reached: {str(error) or type(error).__name__}."
            ) from error

    return post


def _check(status: int, body: bytes) -> bytes:
    """The body of an answer that is a success."""
    if status in (200, 201):
        return body
    said = body[:200].decode("utf-8", "replace")
    if status == 429 or status >= 500 or status in (408, 404):
        raise SourceError(f"The collector answered {status}; reports wait for the next time.")
    raise FleetError(f"The collector refused the reports of this device ({status}): {said}")
