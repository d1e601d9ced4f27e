"""The load: clients that each send their requests one after another (a closed loop), with seeded jitter."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass

from bench.stream import Exchange, exchange

FIRST_JITTER_S = 0.05  # clients never start in the same microsecond
THINK_JITTER_S = 0.01  # nor send their next request in lockstep


@dataclass(frozen=True, slots=True)
class LoadResult:
    """All exchanges, one list a client; times in monotonic seconds."""

    clients: list[list[Exchange]]
    started: float
    finished: float


async def closed_loop(
    port: int, requests: Sequence[Sequence[bytes]], *, seed: int, timeout: float
) -> LoadResult:
    """Run one client for each list of requests. The same seed gives the same pauses. timeout: s a request."""
    chance = random.Random(seed)
    pauses = [
        [chance.uniform(0, THINK_JITTER_S if number else FIRST_JITTER_S) for number in range(len(own))]
        for own in requests
    ]

    async def client(own: Sequence[bytes], waits: Sequence[float]) -> list[Exchange]:
        done = []
        for request, wait in zip(own, waits, strict=True):
            await asyncio.sleep(wait)
            done.append(await exchange(port, request, timeout=timeout))
        return done

    clients = await asyncio.gather(*map(client, requests, pauses))
    everything = [record for own in clients for record in own]
    return LoadResult(
        clients=list(clients),
        started=min(record.started for record in everything),
        finished=max(record.finished for record in everything),
    )
