"""`python -m bench.structured`: do answers under a schema always validate, and what does the grammar cost?

First many answers over twenty schemas, drawn at temperature 0.8: each that ended by itself must validate.
Then constrained and unconstrained answers of the same length in turn on one daemon, for one client and for
eight; what counts is the daemon's own rate of tokens 2..n of each answer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema

from bench import peer as peers
from bench.certificate import certificate, close_certificate, model_file, save
from bench.flags import server_flags
from bench.load import closed_loop
from bench.numbers import paired_ratio, rounded
from bench.peer import BenchError, Settings
from bench.schemas import SCHEMAS
from bench.server import ProcessorWatch, Server, free_port, run_to_end, running
from bench.stream import Exchange, StreamError, exchange, parse_response, request_bytes
from bench.table import aligned, structured_rows
from lichen.errors import LichenError

ROUTE = "/v1/chat/completions"
TEMPERATURE = 0.8
MAX_TOKENS = 400  # the longest answer that a schema allows has about 250
REQUEST_LIMIT_S = 300.0
CLIENTS = (1, 8)
# More than any answer of the measured length holds, so that the constrained side never ends by itself.
WORDS = {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 400, "maxItems": 400}
ENDS = (
    "<|im_end|>",
    "<|endoftext|>",
    "</s>",
    "<|eot_id|>",
)  # kept from both sides, so that lengths are equal
TOPICS = ("rivers", "bread", "winter", "machines", "friendship", "the sea", "gardens", "music")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and one JSON line, write the result. 1 when anything was invalid or failed."""
    flags = server_flags("structured", "answers under a schema", runs=5, context=1024)
    flags.add_argument("--requests", type=int, default=200, help="answers that are validated")
    flags.add_argument("--tokens", type=int, default=96, help="of each answer in that comparison")
    options = flags.parse_args(arguments)
    try:
        record = _measure(options)
    except LichenError as error:
        print(error, file=sys.stderr)
        return 1
    path = save(record)
    print(aligned(structured_rows(record)))
    line = {name: record[name] for name in ("validity", "ratios")}
    print(json.dumps({"bench": "structured", "result": path.name, **line}))
    return 0 if record["status"] == "ok" else 1


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    model = model_file(options.model)
    lichen = peers.load("lichen")
    settings = Settings(
        model=model, threads=options.threads, slots=max(CLIENTS), context=options.context, port=free_port()
    )
    record: dict[str, Any] = {
        "kind": "structured",
        "status": "ok",
        "birth": certificate(model),
        "settings": {
            "slots": settings.slots,
            **{name: getattr(options, name) for name in ("threads", "context", "requests", "tokens")},
        },
        "servers": {"lichen": {"command": lichen.shown_command(settings), **lichen.identity()}},
        "runs": [],
    }

    async def measure() -> None:
        async with running(lichen, settings) as server:
            record["validity"] = await _validity(server, options.requests)
            await _rates(server, options.runs, options.tokens, record["runs"])

    run_to_end(measure())
    close_certificate(record["birth"])
    conclude(record)
    return record


def schema_body(number: int) -> dict[str, Any]:
    """The body of the answer with that number: the schemas in turn, each time with another seed."""
    name = list(SCHEMAS)[number % len(SCHEMAS)]
    wanted = {"name": "it", "schema": SCHEMAS[name], "strict": True}
    return {
        "messages": [{"role": "user", "content": f"Make up a {name}. Answer in JSON."}],
        "response_format": {"type": "json_schema", "json_schema": wanted},
        "temperature": TEMPERATURE,
        "max_tokens": MAX_TOKENS,
        "seed": number,
    }


def verdict(number: int, answer: dict[str, Any]) -> str:
    """What became of the answer with that number: "valid", "length" for one that was cut, or why not."""
    choice = answer["choices"][0]
    if choice["finish_reason"] != "stop":
        return str(choice["finish_reason"])
    try:
        schema = SCHEMAS[list(SCHEMAS)[number % len(SCHEMAS)]]
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        return f"invalid: {str(error).splitlines()[0]}"
    return "valid"


async def _validity(server: Server, count: int) -> dict[str, Any]:
    port, clients = server.settings.port, server.settings.slots
    numbers = [range(first, count, clients) for first in range(min(clients, count))]
    requests = [[request_bytes(port, ROUTE, schema_body(number)) for number in own] for own in numbers]
    result = await closed_loop(port, requests, seed=1, timeout=REQUEST_LIMIT_S)
    verdicts = {
        number: verdict(number, answer_of(record))
        for own, records in zip(numbers, result.clients, strict=True)
        for number, record in zip(own, records, strict=True)
    }
    names = list(SCHEMAS)
    return {
        "requests": count,
        "valid": sum(said == "valid" for said in verdicts.values()),
        "cut_by_length": sum(said == "length" for said in verdicts.values()),
        "others": {
            f"{names[number % len(names)]}, seed {number}": said
            for number, said in sorted(verdicts.items())
            if said != "valid"
        },
    }


def answer_of(record: Exchange) -> dict[str, Any]:
    """The JSON of a whole answer. Raises BenchError with the daemon's own words for anything but a 200."""
    if record.error is not None:
        raise BenchError(f"lichen did not answer: {record.error}")
    try:
        response = parse_response(record.arrivals)
        answer: dict[str, Any] = json.loads(response.body)
    except (StreamError, ValueError) as error:
        raise BenchError(f"lichen's answer cannot be read: {error}") from error
    if response.status != 200:
        raise BenchError(f"lichen answered {response.status}: {response.body[:300]!r}")
    return answer


async def _rates(server: Server, runs: int, tokens: int, entries: list[dict[str, Any]]) -> None:
    ends = await _end_tokens(server)
    await _side(server, _Side(True, 1, 0, 8, ends))  # compiles the grammar and touches what both sides need
    for clients in CLIENTS:
        for run in range(runs):
            for constrained in (True, False) if run % 2 == 0 else (False, True):
                with ProcessorWatch(server.process.pid) as processor:
                    answers = await _side(server, _Side(constrained, clients, run, tokens, ends))
                entry = {
                    "run": run,
                    "clients": clients,
                    "side": "constrained" if constrained else "plain",
                    "status": "ok",
                    "tokens_per_second": _median_rate(answers),
                    "tokens": [answer["usage"]["completion_tokens"] for answer in answers],
                    "foreign_cores": round(processor.foreign_cores, 3),
                }
                entries.append(entry)
                print(
                    {key: entry[key] for key in ("run", "clients", "side", "tokens_per_second")},
                    file=sys.stderr,
                )


async def _end_tokens(server: Server) -> tuple[int, ...]:
    """Ids of the tokens that end an answer of this model, as far as their usual names go."""
    port = server.settings.port
    found: list[int] = []
    for text in ENDS:
        request = request_bytes(port, "/tokenize", {"content": text})
        tokens = answer_of(await exchange(port, request, timeout=REQUEST_LIMIT_S))["tokens"]
        found += tokens if len(tokens) == 1 else []
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Side:
    """One answer for each of `clients`, all at once."""

    constrained: bool
    clients: int
    run: int
    tokens: int
    ends: tuple[int, ...]

    def body(self, client: int) -> dict[str, Any]:
        """Both sides are asked the same; only one is bound."""
        topic = TOPICS[client % len(TOPICS)]
        question = f"Write a long list, number {self.run}, of words about {topic}, and explain each."
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": question}],
            "temperature": TEMPERATURE,
            "max_tokens": self.tokens,
            "seed": 1000 * self.run + client,
            "logit_bias": {str(token): -100 for token in self.ends},
        }
        if self.constrained:
            wanted = {"name": "words", "schema": WORDS}
            body["response_format"] = {"type": "json_schema", "json_schema": wanted}
        return body


async def _side(server: Server, side: _Side) -> list[dict[str, Any]]:
    port = server.settings.port
    requests = [[request_bytes(port, ROUTE, side.body(client))] for client in range(side.clients)]
    result = await closed_loop(port, requests, seed=side.run, timeout=REQUEST_LIMIT_S)
    return [answer_of(record) for own in result.clients for record in own]


def _median_rate(answers: Sequence[dict[str, Any]]) -> float:
    rates: list[float] = [answer["timings"]["tokens_per_second"] for answer in answers]
    return round(statistics.median(rates), 3)


def conclude(record: dict[str, Any]) -> None:
    """Medians, ratios constrained / plain paired by run, and whether all is as it must be."""
    validity = record["validity"]
    if validity["valid"] + validity["cut_by_length"] < validity["requests"]:
        record["status"] = "failed"
    record["summary"], record["ratios"] = {}, {}
    for clients in CLIENTS:
        sides: dict[str, dict[int, float | None]] = {"constrained": {}, "plain": {}}
        for entry in record["runs"]:
            if entry["clients"] == clients:
                sides[entry["side"]][entry["run"]] = entry["tokens_per_second"]
        record["summary"][str(clients)] = {
            side: rounded(statistics.median(value for value in values.values() if value is not None), 2)
            for side, values in sides.items()
        }
        record["ratios"][str(clients)] = paired_ratio(sides["constrained"], sides["plain"])


if __name__ == "__main__":
    sys.exit(main())
