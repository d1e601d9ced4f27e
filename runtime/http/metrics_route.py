"""`GET /metrics`: what lichen counts, for Prometheus."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from typing import get_args

from aiohttp import web

import lichen
from lichen.adapters.jobs import Status
from lichen.runtime import native
from lichen.runtime.http.guard import ERROR_CODE
from lichen.runtime.learning import Learning
from lichen.runtime.metrics import CONTENT_TYPE, ProcessFacts, ProcessMetrics, render
from lichen.runtime.served_model import ServedModel


class MetricsRoute:
    """The handler, over the models that `models` gives. resident, journal: bytes of this process and of its
    journal; may block. learning: None where this daemon learns nothing."""

    def __init__(
        self,
        models: Callable[[], Iterable[ServedModel]],
        process: ProcessMetrics,
        resident: Callable[[], int],
        journal: Callable[[], int] = lambda: 0,
        learning: Learning | None = None,
    ) -> None:
        self._models = models
        self._process = process
        self._resident = resident
        self._journal = journal
        self._learning = learning

    def routes(self) -> list[web.RouteDef]:
        """Route table for `Application.add_routes`."""
        return [web.get("/metrics", self.metrics)]

    async def metrics(self, request: web.Request) -> web.Response:
        """Every series, read now."""
        facts = await asyncio.to_thread(self._facts)
        text = render(self._models(), self._process, facts)
        return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})

    def _facts(self) -> ProcessFacts:
        jobs: dict[str, int] = {}
        training = None
        if self._learning is not None:
            jobs = dict.fromkeys(get_args(Status), 0) | Counter(
                one.status for one in self._learning.store.jobs()
            )
            if (step := self._learning.latest) is not None:
                training = (step.tokens_per_second, step.loss)
        return ProcessFacts(
            resident=self._resident(),
            version=lichen.__version__,
            llama_cpp=native.version(),
            journal=self._journal(),
            jobs=jobs,
            training=training,
        )

    async def count_error(self, request: web.Request, response: web.StreamResponse) -> None:
        """aiohttp `on_response_prepare` signal: count an answer that is an error by its code."""
        code = response.get(ERROR_CODE)
        if code is not None:
            self._process.failed(code)
