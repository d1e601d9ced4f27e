"""docs/architecture.md tells the truth: a real request takes the hops that it draws."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from lichen.runtime.engine import Engine
from lichen.runtime.http.openai import OpenAIRoutes
from lichen.runtime.native import Context
from lichen.runtime.served_model import ServedModel
from tests.conftest import daemon_over

PAGE = Path(__file__).resolve().parent.parent / "docs" / "architecture.md"
HOP = re.compile(r"^\d  (\S+\.py)\s+(\w+)\.(\w+)", re.MULTILINE)
CLASSES: list[type] = [OpenAIRoutes, ServedModel, Engine, Context]


async def test_a_request_walks_the_drawn_path(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn = [(owner, method) for _, owner, method in HOP.findall(PAGE.read_text(encoding="utf-8"))]
    assert 1 < len(drawn) <= 5
    walked: list[tuple[str, str]] = []

    def traced(owner: type, method: str) -> None:
        original = getattr(owner, method)

        def note() -> None:
            if (owner.__name__, method) not in walked:
                walked.append((owner.__name__, method))

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            note()
            return original(self, *args, **kwargs)

        async def acall(self: Any, *args: Any, **kwargs: Any) -> Any:
            note()
            return await original(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, acall if inspect.iscoroutinefunction(original) else call)

    by_name = {kind.__name__: kind for kind in CLASSES}
    for owner, method in drawn:
        traced(by_name[owner], method)
    daemon = daemon_over(served, tmp_path)
    async with TestClient(TestServer(daemon.application())) as client:
        body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 2}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status == 200
    assert walked == drawn


def test_the_files_of_the_hops_are_there() -> None:
    for file, owner, _ in HOP.findall(PAGE.read_text(encoding="utf-8")):
        assert f"class {owner}" in (PAGE.parent.parent / file).read_text(encoding="utf-8")
