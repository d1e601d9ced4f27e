"""What benchmarks of plans share: fingerprints and layouts in a home of their own, and servers that run a
plan, an intent, or the defaults of others.

The home is below `.build/` and stays, so that a layout is made once; fingerprints are taken anew, since their
seconds count.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.peer import ROOT, BenchError, Peer, Settings
from bench.peers import lichen as lichen_peer
from bench.peers import llama_server
from bench.server import Server
from bench.stream import StreamError, exchange, parse_response, request_bytes
from lichen.config import Config, load, override
from lichen.devices.curves import Fingerprint
from lichen.devices.pace import Plan
from lichen.devices.plan import CHUNKS
from lichen.devices.telling import settings
from lichen.planning import BUDGET_S, ROUNDS, Asked, process_bytes
from lichen.quant.gguf_check import check_gguf
from lichen.runtime.fingerprints import take_fingerprint
from lichen.runtime.layout_maker import make_layout as write_layout
from lichen.runtime.layouts import SOURCE, divergence, find, worth_measuring
from lichen.sync.download import hash_file

HOME = ROOT / ".build" / "bench-home"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model that can be planned for. files: of each layout. kl: mean divergence of each layout from the
    file that was asked for. fingerprint_s: seconds that all fingerprints took."""

    asked: Asked
    fingerprints: Mapping[str, Fingerprint]
    files: Mapping[str, Path]
    kl: Mapping[str, float]
    fingerprint_s: float

    def memory(self, plan: Plan) -> int:
        """Bytes of a daemon that runs it, as predicted."""
        return process_bytes(check_gguf(self.asked.path))(self.fingerprints[plan.layout], plan)


def configuration(home: Path, context: int) -> Config:
    """lichen's defaults over a home of the benchmark's own. context: tokens of a conversation."""
    return override(load({}, {}).config, {"home": home, "context": context})


def prepare(model: Path, home: Path, layouts: Sequence[str] = (), *, again: bool = True) -> Prepared:
    """Fingerprints, then the layouts that are missing. again: forget fingerprints of earlier. Raises LichenError."""
    asked = Asked(name=model.stem, path=model, sha256=hash_file(model))
    names = list(layouts) or worth_measuring(check_gguf(model))
    home.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    found: dict[str, Fingerprint] = {}
    for name in names:
        taken = take_fingerprint(
            model, asked.sha256, home, layout=name, again=again, rounds=ROUNDS, budget_s=BUDGET_S
        )
        assert taken is not None, "nothing stops it"
        found[name] = taken
    seconds = time.perf_counter() - began
    files = {name: model if name == SOURCE else make_layout(asked, name, home) for name in names}
    known = {SOURCE: 0.0, **divergence(home, asked.sha256)}
    return Prepared(
        asked=asked,
        fingerprints=found,
        files=files,
        kl={name: known[name] for name in names},
        fingerprint_s=seconds,
    )


def make_layout(asked: Asked, layout: str, home: Path) -> Path:
    """The file of a layout, made where it is not here, at this process's own priority. Raises LichenError."""
    if find(home, asked.sha256, layout) is None:
        write_layout(asked.path, asked.sha256, layout, home, lambda now: None)
    present = find(home, asked.sha256, layout)
    if present is None:
        raise BenchError(f"The layout {layout} was made and is not in {home}.")
    return present[1]


# ---- servers --------------------------------------------------------------------------------------


def plan_peer(name: str, plan: Plan, home: Path) -> Peer:
    """lichen with a fixed plan; its `Settings.model` is the file of the plan's layout."""
    flags = [word for key, value in settings(plan).items() for word in (_flag(key), str(value))]
    return _lichen(name, f"lichen, {plan_words(plan)}", home, flags)


def intent_peer(name: str, intent: str, objectives: str, context: int, home: Path) -> Peer:
    """lichen that plans for itself, and replans."""
    flags = ["--intent", intent, "--objectives", objectives, "--context", str(context)]
    return _lichen(name, f"lichen --intent {intent}", home, flags)


def _lichen(name: str, title: str, home: Path, flags: Sequence[str]) -> Peer:
    def arguments(chosen: Settings) -> list[str]:
        return [
            *("-m", "lichen.cli", "--home", str(home), "serve"),
            *("--model", str(chosen.model)),
            *("--host", "127.0.0.1"),
            *("--port", str(chosen.port)),
            *("--queue", "256"),
            *("--prefix-cache", "0"),  # a run must not find what an earlier one has computed
            *flags,
        ]

    return dataclasses.replace(lichen_peer.PEER, name=name, title=title, arguments=arguments)


def plan_words(plan: Plan) -> str:
    """A plan in a few words, which no other plan of a benchmark has."""
    threads = f"{plan.threads} thread{'s' * (plan.threads > 1)}"
    chunk = f", chunks of {plan.chunk}" if plan.chunk != CHUNKS[0] else ""
    return f"{plan.layout}, {plan.slots} slot{'s' * (plan.slots > 1)}, {threads}{chunk}"


def _flag(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


def llama_default() -> Peer:
    """llama-server as it starts by itself: four slots that share a cache as long as the model's context."""

    def arguments(chosen: Settings) -> list[str]:
        return [*_llama(chosen), *("--parallel", "4"), *("--ctx-size", "0"), "--kv-unified"]

    return dataclasses.replace(
        llama_server.PEER,
        name="llama_default",
        title="llama-server, defaults",
        arguments=arguments,
        notes=(
            "what the program sets where nothing is said: 4 slots over one cache of the model's own context",
        ),
    )


def llama_slots(slots: int, context: int) -> Peer:
    """llama-server that was told how many clients there are."""

    def arguments(chosen: Settings) -> list[str]:
        return [*_llama(chosen), *("--parallel", str(slots)), *("--ctx-size", str(slots * context))]

    return dataclasses.replace(
        llama_server.PEER,
        name="llama_slots",
        title=f"llama-server, {slots} slot{'s' * (slots > 1)}",
        arguments=arguments,
        notes=(),
    )


def ollama_like() -> Peer:
    """llama-server as Ollama would run the model: one request at a time, 4,096 tokens, batches of 512."""

    def arguments(chosen: Settings) -> list[str]:
        sizes = (*("--parallel", "1"), *("--ctx-size", "4096"), *("--batch-size", "512"))
        return [*_llama(chosen), *sizes, *("--cache-ram", "0")]

    return dataclasses.replace(
        llama_server.PEER,
        name="ollama_like",
        title="llama-server, as Ollama",
        arguments=arguments,
        notes=(
            "OLLAMA_NUM_PARALLEL 1, context 4,096 and num_batch 512, which are Ollama's defaults on a CPU",
        ),
    )


def _llama(chosen: Settings) -> list[str]:
    return [
        str(ROOT / "bench" / "xllamacpp_server.py"),
        *("--model", str(chosen.model)),
        *("--port", str(chosen.port)),
        *("--threads", str(chosen.threads)),
    ]


def shown_command(peer: Peer, chosen: Settings, home: Path) -> str:
    """Its command line without this machine's paths."""
    return peer.shown_command(chosen).replace(str(home), "HOME")


def described(peer: Peer, chosen: Settings, home: Path) -> dict[str, Any]:
    """What a result says of a server."""
    return {
        "title": peer.title,
        "command": shown_command(peer, chosen, home),
        "notes": list(peer.notes),
        **peer.identity(),
    }


async def status_of(server: Server) -> dict[str, Any]:
    """`/status` of a daemon. Raises BenchError."""
    record = await exchange(server.settings.port, request_bytes(server.settings.port, "/status"), timeout=10)
    try:
        status: dict[str, Any] = json.loads(parse_response(record.arrivals).body)
    except (StreamError, ValueError) as error:
        raise BenchError(f"The daemon does not say its status: {record.error or error}") from error
    return status
