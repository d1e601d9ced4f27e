"""The real scheduler in virtual time: what a plan does under a load, if batches take what curves say."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass, field
from unittest.mock import Mock

from lichen.devices.cost import Plan
from lichen.devices.curves import Fingerprint
from lichen.devices.intent import Load
from lichen.runtime.generation import Mailbox
from lichen.runtime.scheduler import Budget, Chunk, Scheduler
from lichen.runtime.sequence import SamplingOptions, Sequence


@dataclass
class Seen:
    """What happened after the first round of requests."""

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


@dataclass
class _Request:
    sequence: Sequence
    asked: float
    answer: int
    first: float = 0.0


def run(fingerprint: Fingerprint, plan: Plan, load: Load, *, requests: int, seed: int = 1) -> Seen:
    """Users who ask again as soon as they are answered; answers of equal length where they go together."""
    chance = random.Random(seed)
    scheduler = Scheduler(Budget(step=plan.batch, prompts_step=plan.prompts_step, share=plan.share))
    now, asked, seen, last = 0.0, 0, Seen(), {}
    waiting: list[_Request] = []
    running: list[_Request] = []

    def ask(at: float) -> None:
        nonlocal asked
        asked += 1
        spread = 1.0 if load.together else chance.uniform(0.5, 1.5)
        sequence = Sequence(prompt=[1] * load.prompt, options=SamplingOptions(), mailbox=Mock(spec=Mailbox))
        sequence.computed = load.shared if load.shared < load.prompt else load.prompt - 1
        waiting.append(_Request(sequence, at, max(2, round(spread * load.answer))))

    for _ in range(load.users):
        ask(0.0)
    warm = 3 * load.users
    started = 0.0
    done = 0
    while done < requests + warm:
        while waiting and len(running) < plan.slots:
            running.append(waiting.pop(0))
        chunks = scheduler.plan([request.sequence for request in running])
        now += _seconds(fingerprint, plan, chunks)
        by_id = {request.sequence.id: request for request in running}
        for chunk in chunks:
            request = by_id[chunk.sequence.id]
            chunk.sequence.computed += chunk.count
            if not chunk.completes:
                continue
            chunk.sequence.tokens.append(2)
            counted = done >= warm
            seen.tokens += counted
            if chunk.sequence.drawn == 1:
                if counted:
                    seen.ttft.append(now - request.asked)
            elif counted:
                seen.gaps.append(now - last[chunk.sequence.id])
            last[chunk.sequence.id] = now
            if chunk.sequence.drawn >= request.answer:
                running.remove(request)
                done += 1
                if done == warm:
                    started = now
                if not load.together:
                    ask(now)
        if load.together and not running and not waiting:
            for _ in range(load.users):
                ask(now)
    seen.seconds = now - started
    return seen


def _seconds(fingerprint: Fingerprint, plan: Plan, chunks: list[Chunk]) -> float:
    tokens = sum(chunk.count for chunk in chunks)
    rows = sum(chunk.completes for chunk in chunks)
    attended = sum(chunk.count * (chunk.start + (chunk.count + 1) / 2) for chunk in chunks)
    return fingerprint.seconds(
        tokens, threads=plan.threads, rows=rows, attended=attended, kv_type=plan.kv_type
    )
