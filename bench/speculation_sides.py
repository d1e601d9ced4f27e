"""Who answers in `bench.speculation`: lichen with drafts and without, and llama-server in its settings."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from bench import peer as peers
from bench.load import closed_loop
from bench.peer import Peer, Settings
from bench.server import ProcessorWatch, Server, running
from bench.stream import exchange, request_bytes
from bench.structured import answer_of

ROUTE = "/v1/chat/completions"
REQUEST_LIMIT_S = 240.0
CLIENTS = 16
COPYING = ("repeat", "rewrite", "form", "code")
Work = Mapping[str, Sequence[dict[str, Any]]]  # kind of work -> request bodies

# llama-server's own ways to draft without a second model: as they come, and with shorter keys and drafts, since
# the default drafts 48 tokens at once, which two cores take longer for than for most answers here.
PEER_SETTINGS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "ngram-simple": ("--spec-type", "ngram-simple"),
    "ngram-simple-4-16": ("--spec-type", "ngram-simple", "--spec-size-n", "4", "--spec-size-m", "16"),
    "ngram-map-k-4-16": ("--spec-type", "ngram-map-k", "--spec-size-n", "4", "--spec-size-m", "16"),
    "ngram-mod-8-16": (
        *("--spec-type", "ngram-mod", "--spec-size-n", "8"),
        *("--spec-size-min", "2", "--spec-size-m", "16"),
    ),
}  # fmt: skip


def speculating(options: argparse.Namespace) -> Peer:
    """lichen with drafters on, and nothing remembered from an earlier run."""
    plain = peers.load("lichen")
    more = ["--speculation", options.drafters, "--answer-memory", "0"]
    if options.draft_model:
        more += ["--draft-model", options.draft_model]
    return dataclasses.replace(plain, arguments=lambda settings: [*plain.arguments(settings), *more])


def peer_settings(draft_model: str | None) -> dict[str, Peer]:
    """llama-server in each setting; with a draft model in one more."""
    plain = peers.load("llama_server")
    settings = dict(PEER_SETTINGS)
    if draft_model:
        settings["draft"] = ("--spec-type", "draft-simple", "--draft-model", draft_model)

    def with_flags(more: Sequence[str]) -> Peer:
        return dataclasses.replace(plain, arguments=lambda given: [*plain.arguments(given), *more])

    return {name: with_flags(flags) for name, flags in settings.items()}


async def try_settings(
    found: Mapping[str, Peer], settings: Settings, bodies: Sequence[dict[str, Any]], tokens: int
) -> dict[str, float]:
    """Tokens a second of each of llama-server's settings on the same questions, one server after the other."""
    rates = {}
    for name, peer in found.items():
        async with running(peer, settings) as server:
            answers = []
            for body in bodies:
                await ask(server, body, 1)
                answers.append(await ask(server, body, tokens))
        rates[name] = rate_of(answers)
        print(json.dumps({"trial": name, "tokens_per_second": rates[name]}), file=sys.stderr, flush=True)
    return rates


async def alternate(
    servers: Mapping[str, tuple[Server, bool | None]],
    work: Work,
    tokens: int,
    minutes: float,
    entries: list[dict[str, Any]],
) -> None:
    """A question of each kind in turn, asked of every side, so that a budget that ends early cuts all kinds alike.

    servers: side -> server, and whether it drafts (None: as it was started). The order of sides changes from
    question to question, and each finds its prompt computed.
    """
    began = time.monotonic()
    rounds = itertools.zip_longest(*([(kind, body) for body in bodies] for kind, bodies in work.items()))
    processes = sorted({server.process.pid for server, _ in servers.values()})
    for number, one in enumerate(entry for turn in rounds for entry in turn if entry is not None):
        if time.monotonic() - began > minutes * 60:
            print(f"the budget of {minutes:.1f} minutes ends after {number} questions", file=sys.stderr)
            return
        kind, body = one
        entry: dict[str, Any] = {"status": "ok", "question": number, "work": kind, "sides": {}}
        with ProcessorWatch(*processes) as processor:
            for server in {id(server): server for server, _ in servers.values()}.values():
                await ask(server, body, 1, drafts=False if server.peer.name == "lichen" else None)
            turn = number % len(servers)
            for side in [*list(servers)[turn:], *list(servers)[:turn]]:
                server, drafts = servers[side]
                entry["sides"][side] = await ask(server, body, tokens, drafts=drafts)
        entry["foreign_cores"] = round(processor.foreign_cores, 3)
        entry["same"] = entry["sides"]["plain"]["text"] == entry["sides"]["drafted"]["text"]
        for answer in entry["sides"].values():
            del answer["text"]
        entries.append(entry)
        print(json.dumps(entry), file=sys.stderr, flush=True)


async def ask(
    server: Server, body: Mapping[str, Any], tokens: int, *, drafts: bool | None = None
) -> dict[str, Any]:
    """One greedy answer: tokens, milliseconds of tokens 2..n, drafts, and its text."""
    answer = answer_of(
        await exchange(server.settings.port, _request(server, body, tokens, drafts), timeout=REQUEST_LIMIT_S)
    )
    timings = answer["timings"]
    return {
        "tokens": answer["usage"]["completion_tokens"],
        "decode_ms": timings.get("decode_ms", timings.get("predicted_ms")),
        "draft_n": timings.get("draft_n", 0),
        "draft_n_accepted": timings.get("draft_n_accepted", 0),
        "text": answer["choices"][0]["message"]["content"],
    }


def _request(server: Server, body: Mapping[str, Any], tokens: int, drafts: bool | None) -> bytes:
    whole = {**server.peer.extras, **body, "temperature": 0, "max_tokens": tokens}
    if drafts is not None:
        whole["speculation"] = drafts
    return request_bytes(server.settings.port, ROUTE, whole)


def rate_of(answers: Sequence[Mapping[str, Any]]) -> float:
    """Tokens a second over all answers, the first token of each left out; 0 for answers of one token."""
    seconds = sum(answer["decode_ms"] for answer in answers) / 1e3
    return round(sum(answer["tokens"] - 1 for answer in answers) / seconds, 3) if seconds > 0 else 0.0


async def crowd(lichen: Peer, settings: Settings, work: Work, tokens: int, runs: int) -> list[dict[str, Any]]:
    """Many clients at once, all with drafts and all without, in turn: tokens a second of all together.

    Every second question is one that copies, so that there is something to draft.
    """
    copies = [body for kind in COPYING for body in work.get(kind, ())]
    others = [body for kind, bodies in work.items() if kind not in COPYING for body in bodies]
    mixed = [body for pair in itertools.zip_longest(copies, others) for body in pair if body is not None]
    found = []
    many = dataclasses.replace(settings, slots=CLIENTS)
    async with running(lichen, many) as server:
        for run in range(runs):
            bodies = [mixed[(run * CLIENTS + at) % len(mixed)] for at in range(CLIENTS)]
            await _together(server, bodies, 1, False, run)  # their prompts lie in the slots now
            entry: dict[str, Any] = {"status": "ok", "run": run}
            with ProcessorWatch(server.process.pid) as processor:
                for drafts in (False, True) if run % 2 else (True, False):
                    side = "drafted" if drafts else "plain"
                    entry[side] = await _together(server, bodies, tokens, drafts, run)
            entry["foreign_cores"] = round(processor.foreign_cores, 3)
            found.append(entry)
            print(json.dumps(entry), file=sys.stderr, flush=True)
    return found


async def _together(
    server: Server, bodies: Sequence[dict[str, Any]], tokens: int, drafts: bool, seed: int
) -> dict[str, Any]:
    requests = [[_request(server, body, tokens, drafts)] for body in bodies]
    result = await closed_loop(server.settings.port, requests, seed=seed, timeout=REQUEST_LIMIT_S)
    answers = [answer_of(record) for own in result.clients for record in own]
    count = sum(answer["usage"]["completion_tokens"] for answer in answers)
    return {
        "tokens": count,
        "tokens_per_second": round(count / (result.finished - result.started), 3),
        "draft_n": sum(answer["timings"]["draft_n"] for answer in answers),
        "draft_n_accepted": sum(answer["timings"]["draft_n_accepted"] for answer in answers),
    }


def crowd_summary(entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Medians, and the median of ratios drafted / plain of each run; None without runs."""
    if not entries:
        return None
    ratios = [e["drafted"]["tokens_per_second"] / e["plain"]["tokens_per_second"] for e in entries]
    return {
        "clients": CLIENTS,
        "runs": len(entries),
        **{
            f"{side}_tokens_per_second": round(
                statistics.median(e[side]["tokens_per_second"] for e in entries), 2
            )
            for side in ("plain", "drafted")
        },
        "ratio": round(statistics.median(ratios), 4),
        "low": round(min(ratios), 4),
        "high": round(max(ratios), 4),
        "draft_n": sum(e["drafted"]["draft_n"] for e in entries),
    }
