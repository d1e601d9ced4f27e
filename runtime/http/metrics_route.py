"""`GET /metrics`: what lichen counts, for Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from aiohttp import web

import lichen
from lichen.runtime import native
from lichen.runtime.http.guard import ERROR_CODE
from lichen.runtime.metrics import CONTENT_TYPE, ProcessFacts, ProcessMetrics, render
from lichen.runtime.served_model import ServedModel


class MetricsRoute:
    """The handler, over the models that `models` gives. resident, journal: bytes of this process and of its
    journal; may block."""

    def __init__(
        self,
        models: Callable[[], Iterable[ServedModel]],
        process: ProcessMetrics,
        resident: Callable[[], int],
        journal: Callable[[], int] = lambda: 0,
    ) -> None:
        self._models = models
        self._process = process
        self._resident = resident
        self._journal = journal

    def routes(self) -> list[web.RouteDef]:
        """Route table for `Application.add_routes`."""
        return [web.get("/metrics", self.metrics)]

    async def metrics(self, request: web.Request) -> web.Response:
        """Every series, read now."""
        facts = await asyncio.to_thread(self._facts)
        text = render(self._models(), self._process, facts)
        return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})

    def _facts(self) -> ProcessFacts:
        return ProcessFacts(
            resident=self._resident(),
            version=lichen.__version__,
            llama_cpp=native.version(),
            journal=self._journal(),
        )

    async def count_error(self, request: web.Request, response: web.StreamResponse) -> None:
        """aiohttp `on_response_prepare` signal: count an answer that is an error by its code."""
        code = response.get(ERROR_CODE)
        if code is not None:
            self._process.failed(code)
