"""The embedded API, as a program uses it."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import lichen
from lichen.api import Runtime
from lichen.errors import ConfigError, ContextOverflow, LichenError, RequestError, Unavailable

ASK = [{"role": "user", "content": "Explain in two sentences why the sky is blue."}]


@pytest.fixture
async def runtime(model_path: Path) -> AsyncIterator[Runtime]:
    async with lichen.Runtime(model_path, context=512, slots=2) as runtime:
        yield runtime


async def idle(runtime: Runtime) -> None:
    for _ in range(200):
        counters = runtime.served.engine.counters()
        if not counters.running and not counters.waiting:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"still busy: {counters}")


async def test_a_chat_streams_pieces_and_then_knows_the_whole(runtime: Runtime) -> None:
    stream = runtime.chat(ASK, temperature=0, max_tokens=30)
    pieces = [piece async for piece in stream]
    assert len(pieces) > 10
    assert stream.completion is not None
    assert stream.completion.text == "".join(pieces)
    assert "sky" in stream.completion.text
    assert stream.completion.usage.completion_tokens == 30
    assert stream.completion.finish_reason == "length"
    assert stream.completion.timings.ttft_s > 0


async def test_complete_returns_at_once_and_stop_strings_hold(runtime: Runtime) -> None:
    completion = await runtime.complete("1, 2, 3, 4,", temperature=0, max_tokens=20, stop="7")
    assert completion.text == " 5, 6, "
    assert completion.finish_reason == "stop"


async def test_leaving_the_loop_frees_the_sequence(runtime: Runtime) -> None:
    async for _ in runtime.chat(ASK):
        break
    gc.collect()
    await idle(runtime)
    assert runtime.served.engine.counters().cancelled == 1


async def test_a_timeout_frees_the_sequence(runtime: Runtime) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await runtime.complete("Count to a million: 1, 2, 3,", temperature=0)
    await idle(runtime)
    assert runtime.served.engine.counters().cancelled == 1


async def test_aclose_frees_the_sequence(runtime: Runtime) -> None:
    stream = runtime.chat(ASK)
    await anext(stream)
    await stream.aclose()
    await stream.aclose()
    await idle(runtime)
    with pytest.raises(LichenError, match="closed before"):
        await stream.finish()


async def test_other_threads_with_their_own_loops_may_ask(runtime: Runtime) -> None:
    texts: list[str] = []

    def ask() -> None:
        texts.append(asyncio.run(runtime.complete("1, 2, 3,", temperature=0, max_tokens=4)).text)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join, 30)
    assert texts == [" 4, "] * 4


@pytest.mark.parametrize(
    ("options", "field"),
    [({"temprature": 1}, "temprature"), ({"temperature": "hot"}, None), ({"max_tokens": 0}, "max_tokens")],
)
async def test_wrong_options_are_named(
    runtime: Runtime, options: dict[str, object], field: str | None
) -> None:
    with pytest.raises(RequestError) as caught:
        await runtime.complete("x", **options)
    assert caught.value.param == field


async def test_a_prompt_over_the_context_is_refused(runtime: Runtime) -> None:
    with pytest.raises(ContextOverflow, match="512"):
        await runtime.complete("word " * 600)


async def test_a_schema_and_a_tool_in_the_embedded_api(runtime: Runtime) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["n"],
    }
    question = [{"role": "user", "content": "A number?"}]
    answer = await runtime.chat(
        question, schema=schema | {"additionalProperties": False}, max_tokens=60
    ).finish()
    assert 1 <= json.loads(answer.text)["n"] <= 9
    tool = {
        "type": "function",
        "function": {"name": "roll", "parameters": schema | {"additionalProperties": False}},
    }
    called = await runtime.chat(question, tools=[tool], tool_choice="roll", max_tokens=60).finish()
    assert [call.name for call in called.tool_calls] == ["roll"]
    assert 1 <= json.loads(called.tool_calls[0].arguments)["n"] <= 9
    assert called.text == ""
    with pytest.raises(RequestError, match="tool_choice"):
        runtime.chat(question, tools=[tool], tool_choice="sing")
    with pytest.raises(RequestError, match="tool"):
        runtime.chat(question, tools=[{"name": "roll"}])


async def test_an_embedding_has_length_one(runtime: Runtime) -> None:
    vector = await runtime.embed("moss")
    assert sum(x * x for x in vector) == pytest.approx(1, rel=1e-4)


async def test_before_open_and_after_close_it_says_so(model_path: Path) -> None:
    runtime = lichen.Runtime(model_path, context=256, slots=1)
    with pytest.raises(Unavailable, match="not open"):
        await runtime.complete("x")
    await runtime.open()
    await runtime.close()
    await runtime.close()
    with pytest.raises(Unavailable, match="not open"):
        await runtime.complete("x")


def test_a_wrong_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match="slotz"):
        lichen.Runtime(slotz=3)


LOADS = """
import asyncio, gc, sys
import psutil
import lichen

async def once():
    async with lichen.Runtime(sys.argv[1], context=256, slots=1) as runtime:
        await runtime.complete("1, 2,", max_tokens=2)

async def main():
    loads = int(sys.argv[2])
    for load in range(loads):
        await once()
        if load in (9, loads - 1):
            gc.collect()
            print(psutil.Process().memory_info().rss)

asyncio.run(main())
"""


@pytest.mark.parametrize("loads", [20, pytest.param(50, marks=pytest.mark.slow)])
def test_loads_and_closes_leave_memory_flat(model_path: Path, loads: int) -> None:
    command = [
        sys.executable,
        "-c",
        LOADS,
        str(model_path),
        str(loads),
    ]  # alone, so that no other test counts
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=110)
    early, late = map(int, done.stdout.split())
    assert late - early < 24 << 20, "less than a fifth of one model's memory over all loads"


def test_importing_lichen_is_light() -> None:
    code = (
        "import sys, lichen, lichen.runtime.served_model; lichen.Runtime; "
        "print([m for m in ('torch', 'numpy', 'aiohttp', 'httpx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
