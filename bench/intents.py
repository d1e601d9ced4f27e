"""`python -m bench.intents`: lichen told what it is for, beside llama-server on the same file.

For each intent lichen and its rivals take turns, each started afresh, under the load of that intent:

    throughput  16 clients, short prompts, 64 tokens; beside llama-server's defaults, with 16 slots, and as Ollama
    latency     one client, prompts of about 1,000 tokens, 64 tokens
    memory      one client, short prompts; the resident set, and the speed that it is had at

Layouts are made and fingerprints taken before the clock runs. Beside each stands the mean KL of the layout
that the plan chose to the file that was asked for, measured here on text: above 0.01 a result does not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.certificate import certificate, close_certificate, model_file
from bench.command import carry_out
from bench.flags import server_flags
from bench.intent_tables import AIMS, METRICS, conclude, intent_rows, verdict_rows
from bench.measure import measure, warm_up
from bench.peer import SHOWN_PORT, BenchError, Peer, Settings
from bench.planned import (
    HOME,
    configuration,
    described,
    intent_peer,
    llama_default,
    llama_slots,
    make_layout,
    ollama_like,
    prepare,
    status_of,
)
from bench.prompts import PromptBook, data_folder
from bench.scenarios import Prompts, Scenario, write_prompts
from bench.server import free_port, run_to_end, running
from bench.table import aligned
from lichen.devices.wish import parts_of, wish
from lichen.planning import Asked, plan_for
from lichen.quant.divergence import Tally
from lichen.runtime.layouts import SOURCE
from lichen.runtime.scoring import NativeScorer, stretches

PROMPT_TOKENS = {"short": 60, "long": 1000}
KL_WINDOW, KL_STRETCHES = 256, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """An intent, its load, and whom it is measured beside."""

    intent: str
    scenario: Scenario
    rivals: tuple[Peer, ...]

    @property
    def objectives(self) -> str:
        """The load in the words of `--objectives`."""
        load = self.scenario
        return f"users={load.clients}, prompt={PROMPT_TOKENS[load.prompt]}, answer={load.max_tokens}, together=yes"


def cases(context: int, *, quick: bool) -> list[Case]:
    """All of them; fewer requests where it has to be quick."""
    defaults, ollama = llama_default(), ollama_like()
    crowd = Scenario(prompt="short", max_tokens=64, clients=16, requests=1 if quick else 2)
    reader = Scenario(prompt="long", max_tokens=64, clients=1, requests=2 if quick else 4)
    alone = Scenario(prompt="short", max_tokens=64, clients=1, requests=3 if quick else 6)
    return [
        Case(intent="throughput", scenario=crowd, rivals=(defaults, llama_slots(16, context), ollama)),
        Case(intent="latency", scenario=reader, rivals=(defaults, ollama)),
        Case(intent="memory", scenario=alone, rivals=(defaults, ollama)),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print tables and one JSON line, write the result. 1 when anything failed."""
    flags = server_flags("intents", "lichen with an intent beside llama-server", runs=3, context=2048)
    flags.add_argument("--only", default="", help="intents, with commas")
    flags.add_argument("--home", type=Path, default=HOME, help="where layouts and fingerprints are kept")
    flags.add_argument("--budget", type=float, default=20, help="minutes; no run begins that would pass it")
    flags.add_argument("--seed", type=int, default=1)
    flags.add_argument("--quick", action="store_true", help="one run with few requests")
    flags.add_argument("--publish", action="store_true", help="also write the table of docs/")
    options = flags.parse_args(arguments)
    return carry_out(
        "intents",
        options,
        _measure_all,
        tables=lambda record: [aligned(intent_rows(record)), aligned(verdict_rows(record))],
        line=_line,
    )


def _line(record: dict[str, Any]) -> dict[str, Any]:
    medians = {
        intent: {
            rival: {name: one["median"] for name, one in cells.items()} for rival, cells in rivals.items()
        }
        for intent, rivals in record["ratios"].items()
    }
    return {"status": record["status"], "ratios": medians}


def _measure_all(options: argparse.Namespace) -> dict[str, Any]:
    model = model_file(options.model)
    birth = certificate(model)
    chosen = [
        case
        for case in cases(options.context, quick=options.quick)
        if not options.only or case.intent in options.only.split(",")
    ]
    prepared = prepare(model, options.home, again=not options.quick)
    record: dict[str, Any] = {
        "kind": "intents",
        "status": "ok",
        "birth": birth,
        "settings": {name: getattr(options, name) for name in ("threads", "context", "seed", "quick")},
        "fingerprint_s": round(prepared.fingerprint_s, 2),
        "aims": AIMS,
        "servers": {},
        "cases": [],
        "starts": [],
        "runs": [],
    }
    measured: dict[str, dict[str, Any]] = {SOURCE: {"kl": 0.0, "kl_error": 0.0, "positions": 0}}
    for case in chosen:
        record["cases"].append(_prepared_case(case, prepared.asked, options, measured))
    for case in chosen:
        for peer in _servers(case, options):
            at = _settings(peer, model, case, options, SHOWN_PORT)
            record["servers"][peer.name] = described(peer, at, options.home)
    run_to_end(_alternate(options, model, chosen, record))
    close_certificate(record["birth"])
    conclude(record)
    return record


def _prepared_case(
    case: Case, asked: Asked, options: argparse.Namespace, measured: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The plan that the daemon will make, and the layout for it, made and measured once (kept in `measured`)."""
    config = configuration(options.home, options.context)
    wanted = wish(case.intent, parts_of(case.objectives))
    given = {"context": options.context}
    planned = plan_for(config, asked, wanted, given=given)
    if planned.wanted is not None:
        make_layout(asked, planned.wanted, options.home)
        planned = plan_for(config, asked, wanted, given=given)
    layout = planned.now.plan.layout
    words = {
        name: getattr(planned.now.plan, name) for name in ("slots", "threads", "batch", "chunk", "kv_type")
    }
    if layout not in measured:
        measured[layout] = mean_kl(asked.path, planned.path, options.threads)
    kl = measured[layout]
    found = planned.now.prediction
    predicted = {name: getattr(found, name) for name in ("ttft", "itl", "rate", "memory")}
    print(f"{case.intent}: {layout} {words}, KL {kl['kl']:.4f}", file=sys.stderr, flush=True)
    return {
        "intent": case.intent,
        "load": dataclasses.asdict(case.scenario) | {"name": case.scenario.name},
        "objectives": case.objectives,
        "layout": layout,
        "plan": words,
        "predicted": predicted,
        **kl,
    }


def mean_kl(reference: Path, other: Path, threads: int) -> dict[str, Any]:
    """Mean KL of a file's predictions from another's, in nats a token, on passages; with its standard error."""
    book = PromptBook(data_folder(), seed=7)
    text = "\n\n".join(book.long() for _ in range(4))
    scorers = [NativeScorer(path, window=KL_WINDOW, threads=threads) for path in (reference, other)]
    try:
        tally = Tally()
        tokens = scorers[0].model.tokenize(text, special=False, add_bos=False)
        for part in stretches(tokens, KL_WINDOW, KL_STRETCHES):
            first, second = (scorer.logits(part)[:-1] for scorer in scorers)
            tally.add(second, part[1:], first)
    finally:
        for scorer in scorers:
            scorer.close()
    result = tally.result()
    return {
        "kl": round(result["kl"], 5),
        "kl_error": round(result["kl_error"], 5),
        "positions": result["positions"],
    }


def _servers(case: Case, options: argparse.Namespace) -> list[Peer]:
    own = intent_peer(f"lichen_{case.intent}", case.intent, case.objectives, options.context, options.home)
    return [own, *case.rivals]


def _settings(peer: Peer, model: Path, case: Case, options: argparse.Namespace, port: int) -> Settings:
    slots = case.scenario.clients
    return Settings(model=model, threads=options.threads, slots=slots, context=options.context, port=port)


async def _alternate(
    options: argparse.Namespace, model: Path, chosen: Sequence[Case], record: dict[str, Any]
) -> None:
    """One run after another; within it the intents, and in each the servers, which begin in turn."""
    began, longest = time.monotonic(), 0.0
    book = PromptBook(data_folder(), seed=options.seed)
    prompts = {case.intent: write_prompts(case.scenario, book) for case in chosen}
    for run in range(1 if options.quick else options.runs):
        run_began = time.monotonic()
        if run and run_began - began + longest > 60 * options.budget:
            print(f"the budget of {options.budget:g} minutes ends after {run} runs", file=sys.stderr)
            break
        for case in chosen:
            servers = _servers(case, options)
            turn = run % len(servers)
            for peer in (*servers[turn:], *servers[:turn]):
                at = _settings(peer, model, case, options, free_port())
                await _one_server(run, peer, at, case, prompts[case.intent], record)
        longest = max(longest, time.monotonic() - run_began)


async def _one_server(
    run: int, peer: Peer, at: Settings, case: Case, prompts: Prompts, record: dict[str, Any]
) -> None:
    start: dict[str, Any] = {"run": run, "server": peer.name, "status": "ok", "error": None}
    record["starts"].append(start)
    try:
        async with running(peer, at) as server:
            start["ready_s"] = round(server.ready_s, 3)
            await warm_up(server)
            seed, size = record["settings"]["seed"], record["birth"]["model"]["size"]
            numbers = await measure(server, case.scenario, prompts, seed=seed, model_bytes=size)
            if peer.home == "lichen":
                plan = (await status_of(server))["plan"]
                start["plan"] = {
                    name: plan[name] for name in ("layout", "slots", "threads", "chunk", "changes")
                }
    except BenchError as error:
        start.update(status="failed", error=str(error))
        print(f"run {run + 1} {peer.title}: {error}", file=sys.stderr, flush=True)
        return
    record["runs"].append({"run": run, "server": peer.name, "intent": case.intent, **numbers})
    told = "  ".join(f"{name} {_shown(numbers, path)}" for name, path in METRICS.items())
    print(
        f"run {run + 1} {case.intent:<11}{peer.title:<28}{told}  others {numbers['foreign_cores']:.2f} cores "
        f"{numbers['status']} {'; '.join(numbers['errors'][:1])}",
        file=sys.stderr,
        flush=True,
    )


def _shown(numbers: dict[str, Any], path: tuple[str, ...]) -> str:
    from bench.numbers import dig

    value = dig(numbers, *path)
    return "–" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    sys.exit(main())
