"""A day of a daemon in some minutes: phases of requests at fixed moments, the same for every server.

Each user of a phase asks at moments of its own, every `period` seconds. Who still waits for an answer then
asks as soon as it is there, but what counts is the moment at which he wanted to: a slow server does not get
fewer questions. A request that could not be sent before its phase ended was missed. Nothing here measures.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bench.answer import AnswerError, read_answer
from bench.measure import REQUEST_LIMIT_S
from bench.prompts import PromptBook
from bench.scenarios import chat_request
from bench.stream import Exchange, exchange
from lichen.devices.load import Load

GRACE_S = 30.0  # behind a phase, for its last answers

FAULTS = ("dropped", "late", "slow", "heavy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Users who ask every `period` seconds, for `seconds`. pressed: while another program wants memory."""

    name: str
    users: int
    prompt: Literal["short", "long"] = "short"
    answer: int = 64
    period: float = 8.0
    seconds: float = 60.0
    pressed: bool = False

    def load(self) -> Load:
        """As a plan is made for it when all ask at once."""
        return Load(users=self.users, prompt=1000 if self.prompt == "long" else 60, answer=self.answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request must keep: seconds to the first token, mean seconds between two; and, while memory is
    wanted by others, bytes of the server."""

    ttft: float
    itl: float
    memory: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request: when it was due (monotonic s), and what came; None where it was never sent."""

    phase: str
    due: float
    exchange: Exchange | None


def moments(phase: Phase, seed: int) -> list[list[float]]:
    """For each user, seconds from the phase's beginning at which a question is due."""
    chance = random.Random(f"{seed} {phase.name}")
    found = []
    for _ in range(phase.users):
        first = chance.uniform(0, min(phase.period, phase.seconds / 2))
        count = max(1, int((phase.seconds - first) / phase.period) + 1)
        found.append([first + number * phase.period for number in range(count)])
    return [[moment for moment in own if moment < phase.seconds] for own in found]


async def play(
    port: int, phase: Phase, book: PromptBook, extras: dict[str, Any], *, seed: int
) -> list[Asked]:
    """Ask all that the phase asks, and wait for the answers."""
    began = time.monotonic()
    texts = [[question(phase, book, began + moment) for moment in own] for own in moments(phase, seed)]

    async def user(own: Sequence[float], questions: Sequence[str]) -> list[Asked]:
        asked = []
        for moment, text in zip(own, questions, strict=True):
            due = began + moment
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if time.monotonic() > began + phase.seconds + GRACE_S:
                asked.append(Asked(phase=phase.name, due=due, exchange=None))
                continue
            request = chat_request(port, text, phase.answer, extras)
            one = await exchange(port, request, timeout=REQUEST_LIMIT_S)
            asked.append(Asked(phase=phase.name, due=due, exchange=one))
        return asked

    everyone = await asyncio.gather(*map(user, moments(phase, seed), texts))
    await asyncio.sleep(max(0.0, began + phase.seconds - time.monotonic()))
    return [one for own in everyone for one in own]


def question(phase: Phase, book: PromptBook, moment: float) -> str:
    """One that was not asked before; of its moment where the book has no more."""
    if phase.prompt == "long":
        return book.long()
    try:
        return book.short()
    except LookupError:
        return f"Write a long text about everything that may happen in {moment:.6f} seconds."


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What one request kept. faults: of FAULTS; a missed one is late. ttft, itl: seconds, where it was answered."""

    phase: str
    faults: tuple[str, ...]
    ttft: float | None = None
    itl: float | None = None


def judge(one: Asked, limits: Limits, held: Callable[[float], int] | None) -> Judged:
    """Beside the limits. held: bytes of the server at a moment, where memory counts."""
    if one.exchange is None:
        return Judged(phase=one.phase, faults=("late",))
    try:
        answer = read_answer(one.exchange)
    except AnswerError:
        return Judged(phase=one.phase, faults=("dropped",))
    ttft = one.exchange.started + answer.ttft - one.due
    steps = answer.completion_tokens - 1
    itl = sum(answer.gaps) / steps if steps > 0 else 0.0
    faults = []
    if ttft > limits.ttft:
        faults.append("late")
    if itl > limits.itl:
        faults.append("slow")
    if held is not None and held(one.exchange.finished) > limits.memory:
        faults.append("heavy")
    return Judged(phase=one.phase, faults=tuple(faults), ttft=ttft, itl=itl)


def at_moment(samples: Sequence[tuple[float, int]], moment: float) -> int:
    """The value of the last sample at or before a moment; of the first where there is none."""
    found = samples[0][1] if samples else 0
    for at, value in samples:
        if at > moment:
            break
        found = value
    return found


def count(judged: Sequence[Judged]) -> dict[str, int]:
    """Requests, those with any fault, and those with each."""
    return {
        "requests": len(judged),
        "violations": sum(bool(one.faults) for one in judged),
        **{fault: sum(fault in one.faults for one in judged) for fault in FAULTS},
    }


def fewer(other: int, own: int) -> float:
    """How many times fewer violations `own` are than `other`; none count as one."""
    return round(other / max(1, own), 3)
