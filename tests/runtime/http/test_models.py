"""The routes that load, unload and list models, over models that only take up memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from lichen.errors import EngineError
from lichen.runtime.http.daemon import Daemon, DaemonOptions
from tests.runtime.fake_shelf import FakeShelf

Client = TestClient[web.Request, web.Application]


@asynccontextmanager
async def client_of(shelf: FakeShelf, **options: Any) -> AsyncIterator[Client]:
    pool = shelf.pool(**options)
    daemon = Daemon(DaemonOptions(), pool)
    daemon.state = "ok"
    try:
        async with TestClient(TestServer(daemon.application())) as client:
            yield client
    finally:
        await pool.close()


async def post(client: Client, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    answer = await client.post(path, json=body)
    return answer.status, await answer.json()


async def status_of(client: Client) -> dict[str, dict[str, Any]]:
    status = await (await client.get("/status")).json()
    return {model["name"]: model for model in status["models"]}


async def test_load_list_and_unload() -> None:
    async with client_of(FakeShelf(100, a=40, b=50)) as client:
        status, body = await post(client, "/models/load", model="b", pin=True)
        assert (status, body["status"], body["model"]["pinned"]) == (200, "ready", True)
        await post(client, "/models/load", model="a", keep_alive=60)
        models = await status_of(client)
        assert (models["a"]["expires_in_s"] or 0) > 0, "loaded by its name, not as the default one"
        assert models["b"]["estimate"]["total"] == models["b"]["measured_bytes"] == 50
        cards = (await (await client.get("/v1/models")).json())["data"]
        assert [(card["id"], card["loaded"], card.get("context_length")) for card in cards] == [
            ("a", True, 8),
            ("b", True, 8),
        ]
        assert await post(client, "/models/unload", model="b") == (
            200,
            {"status": "unloaded", "model": "b", "freed_bytes": 50},
        )
        card = await (await client.get("/v1/models/b")).json()
        assert (card["loaded"], card["size"], "context_length" in card) == (False, 50, False)


async def test_a_streamed_load_tells_its_progress_and_its_failure() -> None:
    shelf = FakeShelf(100, a=40, b=40)
    shelf.gate.clear()
    asyncio.get_running_loop().call_later(0.3, shelf.gate.set)
    shelf.failures["b"] = EngineError("No.")
    async with client_of(shelf) as client:
        answer = await client.post("/models/load", json={"model": "a", "stream": True})
        assert answer.headers["Content-Type"] == "application/x-ndjson"
        lines = [json.loads(line) async for line in answer.content]
        assert lines[-1]["status"] == "ready"
        assert {"status": "loading", "progress": 1.0} in lines
        answer = await client.post("/models/load", json={"model": "b", "stream": True})
        lines = [json.loads(line) async for line in answer.content]
        assert lines[-1]["error"]["code"] == "engine_error"


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/models/load", {"model": "z"}, 404, "not_found"),
        ("/models/load", {"model": "big"}, 507, "out_of_memory"),
        ("/models/load", {"model": "a", "pinn": True}, 400, "unsupported_field"),
        ("/models/load", {"model": 3}, 400, "invalid_request"),
        ("/models/load", {"keep_alive": -2}, 400, "invalid_request"),
        ("/models/load", {"keep_alive": 1e300}, 400, "invalid_request"),
        ("/models/unload", {}, 400, "invalid_request"),
        ("/models/unload", {"model": "a"}, 404, "not_found"),
        ("/v1/completions", {"model": "z", "prompt": "x"}, 404, "not_found"),
    ],
)
async def test_refusals(path: str, body: dict[str, Any], status: int, code: str) -> None:
    async with client_of(FakeShelf(100, a=40, big=500)) as client:
        answer, found = await post(client, path, **body)
        assert (answer, found["error"]["code"]) == (status, code)
        assert await status_of(client) == {}


async def test_a_client_that_leaves_gives_up_its_load() -> None:
    shelf = FakeShelf(100, a=40, b=40)
    shelf.gate.clear()
    async with client_of(shelf) as client:
        answer = await client.post("/models/load", json={"model": "b", "stream": True})
        await answer.content.readline()
        answer.close()
        for _ in range(300):
            if shelf.given_up:
                break
            await asyncio.sleep(0.01)
        assert shelf.given_up == 1
        shelf.gate.set()


async def test_no_loads_while_starting_or_stopping() -> None:
    pool = FakeShelf(100, a=40).pool()
    daemon = Daemon(DaemonOptions(), pool)
    async with TestClient(TestServer(daemon.application())) as client:
        assert (await post(client, "/models/load", model="a"))[0] == 503
        assert (await client.get("/health")).status == 503
        daemon.state = "ok"
        assert (await post(client, "/models/load", model="a"))[0] == 200
        assert await daemon.drain()
        assert (await post(client, "/models/load", model="a"))[0] == 503
    await pool.close()
