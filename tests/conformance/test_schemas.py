"""Answers over twenty schemas, drawn at temperature 0.8 with different seeds: all end, and all validate."""

from __future__ import annotations

import asyncio
import json

import httpx
import jsonschema
import pytest

from bench.schemas import RECURSIVE, SCHEMAS
from bench.structured import schema_body, verdict
from tests.conftest import RunningDaemon


async def verdicts(daemon: RunningDaemon, numbers: range) -> dict[int, str]:
    """number -> what became of that answer; eight at once."""
    eight = asyncio.Semaphore(8)

    async def one(client: httpx.AsyncClient, number: int) -> str:
        async with eight:
            response = await client.post("/chat/completions", json=schema_body(number))
        assert response.status_code == 200, response.text
        return verdict(number, response.json())

    async with httpx.AsyncClient(base_url=daemon.base_url, timeout=110) as client:
        return dict(
            zip(numbers, await asyncio.gather(*(one(client, number) for number in numbers)), strict=True)
        )


@pytest.mark.parametrize(
    "count", [pytest.param(40, id="two of each"), pytest.param(200, id="ten of each", marks=pytest.mark.slow)]
)
async def test_all_answers_validate(daemon: RunningDaemon, count: int) -> None:
    found = await verdicts(daemon, range(count))
    assert {number: said for number, said in found.items() if said != "valid"} == {}


def test_an_answer_without_a_bound_is_cut_or_valid(daemon: RunningDaemon) -> None:
    asked = schema_body(0) | {"max_tokens": 60, "temperature": 0}
    asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "tree", "schema": RECURSIVE}}
    choice = httpx.post(f"{daemon.base_url}/chat/completions", json=asked, timeout=60).json()["choices"][0]
    assert choice["message"]["content"].startswith('{"name": "')
    if choice["finish_reason"] == "stop":
        jsonschema.validate(json.loads(choice["message"]["content"]), RECURSIVE)
    else:
        assert choice["finish_reason"] == "length"


def test_a_wrong_answer_would_be_noticed() -> None:
    assert next(iter(SCHEMAS)) == "person"

    def answer(content: str, reason: str = "stop") -> dict[str, object]:
        return {"choices": [{"message": {"content": content}, "finish_reason": reason}]}

    assert verdict(0, answer('{"name": "Ada", "age": 36}')) == "valid"
    assert verdict(0, answer('{"name": "Ada", "age": 360}')).startswith("invalid")
    assert verdict(20, answer('{"name": "Ada"')).startswith("invalid")
    assert verdict(0, answer('{"name": "Ada', "length")) == "length"
