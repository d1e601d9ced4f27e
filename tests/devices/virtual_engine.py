"""The real scheduler in virtual time: what a plan does under a load, if batches take what curves say."""

from __future__ import annotations

import heapq
import random
import statistics
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from unittest.mock import Mock

from lichen.devices.curves import Fingerprint
from lichen.devices.load import Load
from lichen.devices.pace import DELIVERY_S, ROUND_TRIP_S, Plan
from lichen.runtime.batch import micro_batches
from lichen.runtime.generation import Mailbox
from lichen.runtime.scheduler import Budget, Chunk, Scheduler
from lichen.runtime.sequence import SamplingOptions, Sequence


@dataclass
class Seen:
    """What happened after the first requests."""

    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def itl(self) -> float:
        return statistics.fmean(self.gaps)

    def late(self) -> float:
        return statistics.quantiles(self.ttft, n=20)[-1]


@dataclass
class _Request:
    sequence: Sequence
    asked: float
    answer: int
    last: float = 0.0


class VirtualEngine:
    """One run; answers vary by half, but for users who go together."""

    def __init__(self, fingerprint: Fingerprint, plan: Plan, load: Load, seed: int = 1) -> None:
        self._fingerprint, self._plan, self._load = fingerprint, plan, load
        self._chance = random.Random(seed)
        self._scheduler = Scheduler(Budget(step=plan.batch, prompts_step=plan.prompts_step, share=plan.chunk))
        self._coming: list[tuple[float, int]] = []  # a heap of moments
        self._number = count()
        self._now = 0.0

    def run(self, requests: int) -> Seen:
        """Until so many requests are answered, a third as many before them not counted."""
        warm, done, seen, began = requests // 3 + self._load.users, 0, Seen(), 0.0
        waiting: deque[_Request] = deque()
        running: list[_Request] = []
        self._people()
        while done < requests + warm:
            if not running and not waiting:
                self._now = max(self._now, self._coming[0][0])
            while self._coming and self._coming[0][0] <= self._now:
                waiting.append(self._request(heapq.heappop(self._coming)[0]))
            while waiting and len(running) < self._plan.slots:
                running.append(waiting.popleft())
            for request in list(self._step(running)):
                counted = done >= warm
                first, over = request.sequence.drawn == 1, request.sequence.drawn >= request.answer
                seen.tokens += counted
                if counted and first:
                    seen.ttft.append(self._now - request.asked)
                elif counted:
                    seen.gaps.append(self._now - request.last)
                request.last = self._now
                if over:
                    running.remove(request)
                    done += 1
                    began = self._now if done == warm else began
                    self._after(everyone_done=not running and not waiting)
        seen.seconds = self._now - began
        return seen

    def _people(self) -> None:
        if self._load.arrivals is not None:
            self._come(self._chance.expovariate(self._load.arrivals))
            return
        for _ in range(self._load.users):
            self._come(self._chance.expovariate(1 / self._load.pause) if self._load.pause else 0.0)

    def _come(self, moment: float) -> None:
        heapq.heappush(self._coming, (moment, next(self._number)))

    def _after(self, *, everyone_done: bool) -> None:
        """An answer is complete: when its user asks again."""
        load = self._load
        if load.together:
            if everyone_done:
                self._people_again()
        elif load.arrivals is None:
            pause = self._chance.expovariate(1 / load.pause) if load.pause else 0.0
            self._come(self._now + ROUND_TRIP_S + pause)

    def _people_again(self) -> None:
        for _ in range(self._load.users):
            self._come(self._now)

    def _request(self, asked: float) -> _Request:
        load = self._load
        if load.arrivals is not None:
            self._come(asked + self._chance.expovariate(load.arrivals))
        spread = 1.0 if load.together else self._chance.uniform(0.5, 1.5)
        sequence = Sequence(prompt=[1] * load.prompt, options=SamplingOptions(), mailbox=Mock(spec=Mailbox))
        sequence.computed = load.prompt - load.fresh
        return _Request(sequence, asked, max(2, round(spread * load.answer)))

    def _step(self, running: list[_Request]) -> Iterator[_Request]:
        """One batch; those who have a token more."""
        chunks = self._scheduler.plan([request.sequence for request in running])
        self._now += self._seconds(chunks)
        by_id = {request.sequence.id: request for request in running}
        for chunk in chunks:
            chunk.sequence.computed += chunk.count
            if chunk.sequence.remaining == 0:
                chunk.sequence.tokens.append(2)
                yield by_id[chunk.sequence.id]

    def _seconds(self, chunks: list[Chunk]) -> float:
        drawn = sum(chunk.completes for chunk in chunks)
        first, *passes = micro_batches(range(len(chunks)), [chunk.count for chunk in chunks])
        later = sum(self._fingerprint.seconds(width, threads=self._plan.threads) for width in passes)
        return (
            drawn * DELIVERY_S
            + later
            + self._fingerprint.seconds(
                first,
                threads=self._plan.threads,
                rows=drawn,
                attended=sum(
                    chunk.count * (chunk.start + (chunk.count + 1) / 2) for chunk in chunks if chunk.count > 1
                ),
                alone=sum(chunk.start + 1 for chunk in chunks if chunk.count == 1),
                kv_type=self._plan.kv_type,
            )
        )
