"""Users of one daemon for a benchmark of plans, and what their exchanges come to.

Two kinds, since a plan is predicted for either (`devices/load.py`). *Together*: all ask at one moment, and
again when the last answer is complete, with answers of one length. *Apart*: each asks again when its own
answer is complete, after a pause, with answers that vary by half. Of those, what counts is the stretch in
which everybody is there: from when each has its first answer until the slowest has its last; whoever is done
earlier goes on asking meanwhile.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bench.answer import Answer, AnswerError, read_answer
from bench.measure import REQUEST_LIMIT_S
from bench.numbers import percentile
from bench.prompts import PromptBook
from bench.scenarios import chat_request
from bench.stream import Exchange, exchange
from lichen.devices.load import Load

SPREAD = (0.5, 1.5)  # of the mean: how long answers of users who are apart may be


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Users and what they ask. answer: mean tokens. requests: of each user, that count. pause: mean s."""

    name: str
    users: int
    prompt: Literal["short", "long"] = "short"
    answer: int = 64
    requests: int = 4
    together: bool = False
    pause: float = 0.0

    def load(self, *, prompt: int, answer: int, shared: int) -> Load:
        """As a plan is made for it, with the lengths in tokens that the daemon counted."""
        return Load(
            users=self.users,
            pause=self.pause,
            prompt=max(1, prompt),
            answer=max(1, answer),
            shared=min(shared, prompt),
            together=self.together,
        )

    @property
    def asked(self) -> int:
        """Requests that every user sends at least."""
        return self.requests + (not self.together)


@dataclass(slots=True)
class Visits:
    """Exchanges in the order of their users; those between `began` and `ended` (monotonic s) count."""

    exchanges: list[Exchange] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0


async def drive(
    port: int, traffic: Traffic, book: PromptBook, extras: Mapping[str, Any], *, seed: int
) -> Visits:
    """Let the users ask until each has what counts. What goes wrong stands in the exchanges."""
    chance = random.Random(f"{seed} {traffic.name}")

    async def ask() -> Exchange:
        text = book.long() if traffic.prompt == "long" else book.short()
        spread = 1.0 if traffic.together else chance.uniform(*SPREAD)
        tokens = max(2, round(spread * traffic.answer))
        return await exchange(port, chat_request(port, text, tokens, extras), timeout=REQUEST_LIMIT_S)

    if traffic.together:
        return await _together(traffic, ask)
    return await _apart(traffic, ask, chance)


async def _together(traffic: Traffic, ask: Callable[[], Any]) -> Visits:
    done = Visits()
    for _ in range(traffic.requests):
        done.exchanges += await asyncio.gather(*(ask() for _ in range(traffic.users)))
    done.began = min(one.started for one in done.exchanges)
    done.ended = max(one.finished for one in done.exchanges)
    return done


async def _apart(traffic: Traffic, ask: Callable[[], Any], chance: random.Random) -> Visits:
    counts = [0] * traffic.users
    done = Visits()
    over = asyncio.Event()

    async def user(number: int) -> None:
        while not over.is_set():
            one = await ask()
            done.exchanges.append(one)
            counts[number] += 1
            if counts[number] == 1 and min(counts) == 1:
                done.began = one.finished
            if counts[number] == traffic.asked and min(counts) >= traffic.asked:
                done.ended = one.finished
                over.set()
            if traffic.pause:
                await asyncio.sleep(chance.expovariate(1 / traffic.pause))

    await asyncio.gather(*(user(number) for number in range(traffic.users)))
    return done


@dataclass(frozen=True, slots=True, kw_only=True)
class Reckoning:
    """What visits came to. Times in seconds, rate in tokens a second of all users, lengths in tokens."""

    ttft: float
    ttft_p95: float
    itl: float
    rate: float
    requests: int
    tokens: int
    prompt: int
    answer: int
    shared: int
    errors: tuple[str, ...]


def reckon(visits: Visits) -> Reckoning | None:
    """The numbers of what counts; None where nothing was answered."""
    answers: list[tuple[Exchange, Answer]] = []
    errors: list[str] = []
    for one in visits.exchanges:
        try:
            answers.append((one, read_answer(one)))
        except AnswerError as error:
            errors.append(str(error))
    counted = [answer for one, answer in answers if one.started >= visits.began]
    steps = sum(max(0, answer.completion_tokens - 1) for answer in counted)
    if not counted or not steps or visits.ended <= visits.began:
        return None
    firsts = [answer.ttft for answer in counted]
    within = sum(tokens_within(one, answer, visits.began, visits.ended) for one, answer in answers)
    return Reckoning(
        ttft=statistics.median(firsts),
        ttft_p95=percentile(firsts, 95),
        itl=sum(sum(answer.gaps) for answer in counted) / steps,
        rate=within / (visits.ended - visits.began),
        requests=len(counted),
        tokens=sum(answer.completion_tokens for _, answer in answers),
        prompt=_mean(answer.prompt_tokens or 0 for answer in counted),
        answer=_mean(answer.completion_tokens for answer in counted),
        shared=_mean(answer.cached_tokens or 0 for answer in counted),
        errors=tuple(errors),
    )


def tokens_within(one: Exchange, answer: Answer, began: float, ended: float) -> float:
    """Tokens of an answer that came between two moments; its pieces of text stand for as many each."""
    moment = one.started + answer.ttft
    times = [moment]
    for gap in answer.gaps:
        moment += gap
        times.append(moment)
    inside = sum(began < time <= ended for time in times)
    return inside * answer.completion_tokens / len(times)


def _mean(values: Iterable[int]) -> int:
    found: Sequence[int] = list(values)
    return round(statistics.fmean(found)) if found else 0
