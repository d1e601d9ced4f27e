"""The publisher's look at a collector: what devices report, and the step that follows from it."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

import msgspec

from lichen.errors import FleetError, NotFound, SourceError
from lichen.sync.collector.board import Census
from lichen.sync.gates import Verdict, advance, applied
from lichen.sync.rollout import Policy

if TYPE_CHECKING:
    import httpx

    from lichen.sync.trust.rollouts import Rollouts

LIMIT = 256 << 20  # bytes of a census: about half a million devices


def slot_of(policy: Policy) -> str:
    """What devices report a rollout under."""
    return f"{policy.kind}/{policy.name}"


async def read_census(client: httpx.AsyncClient, collector: str, token: str, slot: str) -> Census | None:
    """All that a collector knows of a slot; None if nobody has reported. Raises SourceError or FleetError."""
    import httpx

    url, data = f"{collector.rstrip('/')}/v1/census", bytearray()
    headers = {"Authorization": f"Bearer {token}"}
    try:
        async with client.stream("GET", url, params={"slot": slot}, headers=headers) as answer:
            async for part in answer.aiter_bytes():
                data += part
                if len(data) > LIMIT:
                    raise SourceError(f"The collector sends more than {LIMIT:,} bytes.")
    except (httpx.HTTPError, httpx.StreamError) as error:
        raise SourceError(
            f"The collector cannot be reached: {str(error) or type(error).__name__}."
        ) from error
    if answer.status_code == 404:
        return None
    if answer.status_code in (401, 403):
        raise FleetError("The collector does not take this token.", hint="Set LICHEN_FLEET_READER.")
    if answer.status_code != 200:
        raise SourceError(f"The collector answered {answer.status_code}.")
    try:
        return msgspec.json.decode(data, type=Census)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SourceError(f"The collector's census is malformed: {error}.") from error


def empty(slot: str, now: datetime.datetime) -> Census:
    """What is known of a slot that nobody has reported on."""
    return Census(slot=slot, at=now.timestamp(), members=(), reported=())


def step(
    rollouts: Rollouts, name: str, census: Census, now: datetime.datetime, *, person: bool
) -> tuple[Policy, Verdict]:
    """Judge a rollout by a census and sign what follows. Raises FleetError, NotFound.

    person: somebody asks for it, so that a wave that holds may open too.
    """
    verdicts: list[Verdict] = []

    def judge(policy: Policy) -> Policy:
        if census.slot != slot_of(policy):
            raise NotFound(f"The census is of {census.slot!r}, not of {slot_of(policy)!r}.")
        verdict = advance(policy, census.reported, now)
        verdicts.append(verdict)
        return policy if verdict.waits_for_person and not person else applied(policy, verdict, now)

    return rollouts.change(name, judge), verdicts[0]
