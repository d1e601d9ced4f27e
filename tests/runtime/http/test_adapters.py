"""Adapters through the door of a daemon: names, lists, the log, and replacement under load."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from lichen.adapters.registry import Registry
from lichen.runtime.http.daemon import Daemon
from lichen.runtime.served_model import ServedModel
from tests.adapters.made_adapters import add_made
from tests.conftest import MODEL, daemon_over

CLIENTS = 16
SWAPS = 6
LEAST = 32  # requests


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "adapters")


@asynccontextmanager
async def daemon(served: ServedModel, registry: Registry) -> AsyncIterator[tuple[Daemon, httpx.AsyncClient]]:
    """Listening, and a client."""
    found = daemon_over(served, registry.folder.parent, port=0, adapters_folder=registry.folder)
    async with found.listening(), httpx.AsyncClient(base_url=found.url, timeout=60) as client:
        yield found, client


def body(model: str, **more: Any) -> dict[str, Any]:
    said = {"messages": [{"role": "user", "content": "Tell me of a ferry."}], "max_tokens": 6}
    return {"model": model, "temperature": 0, **said, **more}


async def test_an_adapter_is_named_listed_logged_and_rolled_back(
    served: ServedModel, registry: Registry, model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lichen.access")
    first = add_made(registry, "mine", model_path, 1)
    async with daemon(served, registry) as (_, client):
        before = await _asked(client, "mine")
        unpromoted = await client.post("/v1/chat/completions", json=body(f"{MODEL}:mine"))
        assert unpromoted.status_code == 404 and "promote" in unpromoted.json()["error"]["message"]
        registry.promote("mine", first.digest)
        answer = (await client.post("/v1/chat/completions", json=body(f"{MODEL}:mine"))).json()
        assert answer["model"] == f"{MODEL}:mine"
        assert answer["adapter"] == {"sha256": first.digest, "scale": 1.0}
        half = body("default:mine", adapter_scale=0.5, stream=True)
        chunks = (await client.post("/v1/chat/completions", json=half)).text
        events = [json.loads(line[6:]) for line in chunks.splitlines() if line.startswith("data: {")]
        assert {event["adapter"]["scale"] for event in events} == {0.5}
        assert "adapter" not in (await client.post("/v1/chat/completions", json=body("default"))).json()
        messages = [{"role": "user", "content": "Hi"}]
        ollama = {"model": f"{MODEL}:mine:latest", "messages": messages, "stream": False}
        assert (await client.post("/api/chat", json=ollama)).json()["adapter"]["sha256"] == first.digest
        asked = {"model": f"{MODEL}:mine", "input": "A boat."}
        assert (await client.post("/v1/embeddings", json=asked)).json()["adapter"]["sha256"] == first.digest
        assert "adapter" in (await client.post("/api/embed", json=asked)).json()
        lines = [record.getMessage() for record in caplog.records]
        assert any(f"adapter={first.digest}*1 " in line for line in lines)
        assert any(f"adapter={first.digest}*0.5 " in line for line in lines)
        assert any("adapter=- " in line for line in lines)
        assert await _asked(client, "mine") == before + 3, "the embeddings are no answers"
        registry.rollback("mine")
        plain = (await client.post("/v1/chat/completions", json=body(f"{MODEL}:mine"))).json()
        assert "adapter" not in plain and plain["model"] == f"{MODEL}:mine"
        version = f"{MODEL}:mine@{first.digest[:10]}"
        pinned = (await client.post("/v1/completions", json=_text(version))).json()
        assert pinned["adapter"]["sha256"] == first.digest
        registry.remove("mine")
        assert (await client.post("/v1/chat/completions", json=body(f"{MODEL}:mine"))).status_code == 404


async def _asked(client: httpx.AsyncClient, adapter: str) -> int:
    """Answers that were asked for with an adapter, as /metrics counts them."""
    series = f'lichen_adapter_requests_total{{model_name="{MODEL}",adapter="{adapter}"}} '
    lines = (await client.get("/metrics")).text.splitlines()
    return sum(int(line.removeprefix(series)) for line in lines if line.startswith(series))


def _text(model: str) -> dict[str, Any]:
    return {"model": model, "prompt": "Hi", "max_tokens": 1}


async def test_names_that_are_no_adapters_and_scales_without_one(
    served: ServedModel, registry: Registry
) -> None:
    async with daemon(served, registry) as (_, client):
        for name in ("default:../../etc", "default:", ":", "default:none", f"{MODEL}:UPPER", "a:b:c@d"):
            answer = await client.post("/v1/chat/completions", json=body(name))
            assert answer.status_code == 404, (name, answer.text)
        for scale in (0.5, "x", 1e9, None):
            answer = await client.post("/v1/chat/completions", json=body("default", adapter_scale=scale))
            assert answer.status_code == (200 if scale is None else 400), answer.text


async def test_an_adapter_of_another_model_is_refused(
    served: ServedModel, registry: Registry, model_path: Path
) -> None:
    version = add_made(registry, "other", model_path, 1)
    registry.promote("other", version.digest)
    standing = registry.folder / "other" / "standing.json"
    standing.write_text(standing.read_text().replace(version.lineage.base, "f" * 64))
    async with daemon(served, registry) as (_, client):
        answer = await client.post("/v1/chat/completions", json=body("default:other"))
        assert answer.status_code == 422 and "not trained for" in answer.json()["error"]["message"]


async def test_adapters_are_loaded_pinned_and_unloaded_by_name(
    served: ServedModel, registry: Registry, model_path: Path
) -> None:
    version = add_made(registry, "mine", model_path, 2)
    registry.promote("mine", version.digest)
    async with daemon(served, registry) as (_, client):
        name = f"{MODEL}:mine"
        loaded = (await client.post("/models/load", json={"model": name, "pin": True})).json()
        (there,) = [one for one in loaded["model"]["adapters"] if one["sha256"] == version.digest]
        assert there["pinned"] and there["users"] == 0
        assert (await client.post("/models/unload", json={"model": name})).json()["freed_bytes"] > 0
        assert (await client.post("/models/unload", json={"model": name})).status_code == 404
        assert (await client.get("/health")).json()["status"] == "ok"


async def test_replacement_under_load_drops_nobody_and_nobody_sees_two(
    served: ServedModel, registry: Registry, model_path: Path
) -> None:
    """16 clients stream while versions take turns; what was promoted before a request began answers it."""
    digests = [add_made(registry, "mine", model_path, seed, strength=1.0).digest for seed in (1, 2, 3)]
    async with daemon(served, registry) as (_, client):
        texts: dict[str, set[str]] = {digest: set() for digest in digests}
        registry.promote("mine", digests[0])
        promoted, before = [digests[0]], served.engine.counters().adapter_switches
        done = asyncio.Event()
        count = 0

        async def ask() -> None:
            nonlocal count
            while not done.is_set() or count < LEAST:
                already = len(promoted)
                asked = body(f"{MODEL}:mine", stream=True, max_tokens=5, deterministic=count % 8 == 0)
                answer = await client.post("/v1/chat/completions", json=asked)
                assert answer.status_code == 200, answer.text
                events = [json.loads(line[6:]) for line in answer.text.splitlines() if "{" in line]
                seen = {event["adapter"]["sha256"] for event in events}
                assert len(seen) == 1 and "error" not in answer.text
                assert answer.text.rstrip().endswith("[DONE]")
                (digest,) = seen
                assert digest in promoted[already - 1 :], "what was replaced before it began answers it"
                if asked["deterministic"]:
                    said = [event["choices"][0]["delta"].get("content", "") for event in events]
                    texts[digest].add("".join(said))
                count += 1

        clients = [asyncio.ensure_future(ask()) for _ in range(CLIENTS)]
        for number in range(SWAPS):
            while count < (number + 1) * LEAST // (SWAPS + 1):
                await asyncio.sleep(0.01)
            digest = digests[(number + 1) % 3]
            await asyncio.to_thread(registry.promote, "mine", digest)
            promoted.append(digest)
        done.set()
        await asyncio.gather(*clients)
        assert served.engine.counters().adapter_switches - before >= SWAPS // 2
        said = [text for found in texts.values() for text in found]
        assert all(len(found) <= 1 for found in texts.values()), "the same version says the same"
        assert len(said) > 1 and len(set(said)) == len(said), "and another version something else"
