"""What is measured: clients x answer length x kind of prompt, and the requests of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bench.prompts import PromptBook
from bench.stream import request_bytes

PromptKind = Literal["short", "long", "shared"]
ROUTE = "/v1/chat/completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One load. requests: that each client sends, one after another. max_tokens: of each answer.

    `once`: only in the first run, unless every run is asked for whole; these take minutes.

    `shared`: all prompts begin with the same 1,000 tokens, and one request, measured apart as the cold
    one, is answered before the others start.
    """

    prompt: PromptKind
    max_tokens: int
    clients: int
    requests: int
    once: bool = False

    @property
    def name(self) -> str:
        """How tables, files and `--scenario` call it."""
        return f"{self.prompt}-{self.max_tokens}-c{self.clients}"


# Few clients ask more often, so that each cell rests on enough answers. `once` keeps three runs of three
# servers at half an hour on two cores.
SCENARIOS = (
    Scenario(prompt="short", max_tokens=64, clients=1, requests=5),
    Scenario(prompt="short", max_tokens=64, clients=4, requests=3),
    Scenario(prompt="short", max_tokens=64, clients=16, requests=2),
    Scenario(prompt="short", max_tokens=256, clients=1, requests=2, once=True),
    Scenario(prompt="short", max_tokens=256, clients=4, requests=1, once=True),
    Scenario(prompt="short", max_tokens=256, clients=16, requests=1, once=True),
    Scenario(prompt="long", max_tokens=64, clients=1, requests=3),
    Scenario(prompt="long", max_tokens=64, clients=4, requests=1),
    Scenario(prompt="long", max_tokens=64, clients=16, requests=1, once=True),
    Scenario(prompt="long", max_tokens=256, clients=1, requests=1, once=True),
    Scenario(prompt="long", max_tokens=256, clients=4, requests=1, once=True),
    Scenario(prompt="long", max_tokens=256, clients=16, requests=1, once=True),
    Scenario(prompt="shared", max_tokens=64, clients=1, requests=4),
    Scenario(prompt="shared", max_tokens=64, clients=16, requests=1),
)
QUICK = ("short-64-c1", "short-64-c16")


def choose(names: Sequence[str], *, quick: bool) -> list[Scenario]:
    """The scenarios whose names begin with one of `names` (all without names). Raises ValueError for none."""
    wanted = [scenario for scenario in SCENARIOS if not quick or scenario.name in QUICK]
    if names:
        wanted = [scenario for scenario in wanted if scenario.name.startswith(tuple(names))]
    if not wanted:
        known = ", ".join(scenario.name for scenario in SCENARIOS)
        raise ValueError(f"no scenario matches {', '.join(names)}; there are {known}")
    return wanted


@dataclass(frozen=True, slots=True)
class Prompts:
    """User messages of one scenario: one list a client, and the one that is asked before, if any."""

    first: str | None
    clients: tuple[tuple[str, ...], ...]


def write_prompts(scenario: Scenario, book: PromptBook) -> Prompts:
    """Take the scenario's texts from the book."""
    prefix = book.prefix() if scenario.prompt == "shared" else None

    def text() -> str:
        if prefix is not None:
            return f"{prefix}\n\n{book.short()}"
        return book.long() if scenario.prompt == "long" else book.short()

    first = text() if prefix is not None else None
    return Prompts(
        first, tuple(tuple(text() for _ in range(scenario.requests)) for _ in range(scenario.clients))
    )


def chat_request(port: int, text: str, max_tokens: int, extras: Mapping[str, Any]) -> bytes:
    """One streamed, greedy chat request as bytes; `extras` are the server's own fields."""
    body = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **extras,
    }
    return request_bytes(port, ROUTE, body)
