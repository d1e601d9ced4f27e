"""Ollama's routes about models: tags, ps, show and pull."""

from __future__ import annotations

import asyncio
import datetime
from typing import Any

import msgspec
from aiohttp import web

from lichen.errors import LichenError
from lichen.quant.gguf_check import GGUFArray, GGUFSummary, check_gguf
from lichen.runtime.http.ollama_schema import ModelRequest
from lichen.runtime.http.openai import json_response, read
from lichen.runtime.pool import ModelPool
from lichen.sync.store import ModelManifest, PullProgress, Store

CAPABILITIES = ("completion", "tools", "embedding")
FOREVER = datetime.timedelta(days=36500)


class ModelFacts:
    """The handlers, over the store and the pool of loaded models."""

    def __init__(self, store: Store, pool: ModelPool) -> None:
        self._store = store
        self._pool = pool

    def routes(self) -> list[web.RouteDef]:
        """Route table for `Application.add_routes`."""
        return [
            web.get("/api/tags", self.tags),
            web.get("/api/ps", self.ps),
            web.post("/api/show", self.show),
            web.post("/api/pull", self.pull),
        ]

    async def tags(self, request: web.Request) -> web.Response:
        """All models of the store."""
        manifests = await asyncio.to_thread(self._store.manifests)
        return json_response({"models": [_card(manifest) for manifest in manifests]})

    async def ps(self, request: web.Request) -> web.Response:
        """The models that are loaded, their memory in bytes, and when they will be unloaded."""
        models = []
        for loaded in self._pool.loaded():
            info = loaded.model.info
            rest = FOREVER if loaded.expires_in is None else datetime.timedelta(seconds=loaded.expires_in)
            models.append(
                {
                    "name": info.name,
                    "model": info.name,
                    "size": loaded.memory,
                    "digest": info.sha256,
                    "details": {"family": info.architecture, "format": "gguf"},
                    "expires_at": (datetime.datetime.now(datetime.UTC) + rest).isoformat(),
                    "size_vram": 0,
                    "context_length": info.context,
                }
            )
        return json_response({"models": models})

    async def show(self, request: web.Request) -> web.Response:
        """What a model's file says of itself."""
        body: ModelRequest = await read(request, ModelRequest)
        manifest = self._store.get(body.reference().removesuffix(":latest"))
        summary = await asyncio.to_thread(check_gguf, self._store.blob_path(manifest))
        metadata = {key: _shown(value) for key, value in summary.metadata.items()}
        return json_response(
            {
                "modelfile": f"FROM {manifest.source}",
                "parameters": "",
                "template": metadata.get("tokenizer.chat_template", ""),
                "details": _details(manifest, summary),
                "model_info": {
                    key: value for key, value in metadata.items() if key != "tokenizer.chat_template"
                },
                "capabilities": list(CAPABILITIES),
                "modified_at": manifest.pulled_at,
            }
        )

    async def pull(self, request: web.Request) -> web.StreamResponse:
        """Fetch a model of the catalog or from a source; progress as lines unless `stream` is false."""
        body: ModelRequest = await read(request, ModelRequest)
        reference = body.reference().removesuffix(":latest")
        if not body.stream:
            await self._store.pull(reference)
            return json_response({"status": "success"})
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        reports: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def report(now: PullProgress) -> None:  # from the loop, or from a thread that hashes
            loop.call_soon_threadsafe(reports.put_nowait, _progress(now))

        work = asyncio.ensure_future(self._store.pull(reference, progress=report))
        work.add_done_callback(lambda _done: reports.put_nowait(None))
        try:
            while (line := await reports.get()) is not None:
                await response.write(msgspec.json.encode(line) + b"\n")
            await work
            await response.write(b'{"status":"success"}\n')
        except LichenError as error:
            await response.write(msgspec.json.encode({"error": str(error)}) + b"\n")
        except ConnectionError:  # the client is gone; what was fetched stays for the next pull
            return response
        finally:
            work.cancel()
        await response.write_eof()
        return response


def _card(manifest: ModelManifest) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "model": manifest.name,
        "modified_at": manifest.pulled_at,
        "size": manifest.size,
        "digest": manifest.sha256,
        "details": _details(manifest, None),
    }


def _details(manifest: ModelManifest, summary: GGUFSummary | None) -> dict[str, Any]:
    size = "" if summary is None else f"{summary.parameter_count / 1e6:.0f}M"
    return {
        "parent_model": "",
        "format": "gguf",
        "family": manifest.architecture,
        "families": [manifest.architecture],
        "parameter_size": size,
        "quantization_level": "",
    }


def _progress(now: PullProgress) -> dict[str, Any]:
    line: dict[str, Any] = {"status": now.phase}
    if now.total is not None:
        line |= {"digest": "", "total": now.total, "completed": now.done}
    return line


def _shown(value: Any) -> Any:
    if isinstance(value, GGUFArray):
        return None if value.items is None else list(value.items)
    return value
