"""The official `openai` package against a real daemon: chat and completions, sync and async."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import openai
import pytest

from lichen.runtime.served_model import ServedModel
from tests.conftest import RunningDaemon

ASK: list[openai.types.chat.ChatCompletionMessageParam] = [
    {"role": "user", "content": "Explain in two sentences why the sky is blue."}
]


@pytest.fixture
def client(daemon: RunningDaemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=daemon.base_url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(daemon: RunningDaemon) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=daemon.base_url, api_key="none", max_retries=0) as client:
        yield client


def test_chat_and_its_exact_usage(client: openai.OpenAI, daemon: RunningDaemon, served: ServedModel) -> None:
    answer = client.chat.completions.create(model=daemon.model, messages=ASK, temperature=0, max_tokens=32)
    choice = answer.choices[0]
    assert choice.finish_reason == "length"
    assert "sky is blue" in (choice.message.content or "")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(
        served.chat_tokens([{"role": "user", "content": ASK[0]["content"]}])
    )
    assert answer.usage.completion_tokens == 32
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 32


def test_a_stream_has_role_deltas_reason_and_usage(client: openai.OpenAI, daemon: RunningDaemon) -> None:
    whole = client.chat.completions.create(model=daemon.model, messages=ASK, temperature=0, max_tokens=16)
    chunks = list(
        client.chat.completions.create(
            model=daemon.model,
            messages=ASK,
            temperature=0,
            max_tokens=16,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == "length"
    assert set(reasons[:-1]) == {None}
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 16
    assert chunks[-1].choices == []


def test_completions_whole_and_streamed(client: openai.OpenAI, daemon: RunningDaemon) -> None:
    options = {"model": daemon.model, "prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(**options)  # type: ignore[call-overload]
    assert whole.choices[0].text.startswith(" 5, 6")
    stream = client.completions.create(**options, stream=True)  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_a_stop_string_is_not_shown(client: openai.OpenAI, daemon: RunningDaemon) -> None:
    answer = client.completions.create(
        model=daemon.model, prompt="1, 2, 3, 4,", temperature=0, stop=" 7", max_tokens=20
    )
    assert answer.choices[0].text == " 5, 6,"
    assert answer.choices[0].finish_reason == "stop"


def test_token_ids_are_a_prompt_too(client: openai.OpenAI, daemon: RunningDaemon) -> None:
    answer = client.completions.create(model=daemon.model, prompt=[33, 34, 35], temperature=0, max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3


async def test_the_async_client_whole_and_streamed(
    async_client: openai.AsyncOpenAI, daemon: RunningDaemon
) -> None:
    whole = await async_client.chat.completions.create(
        model=daemon.model, messages=ASK, temperature=0, max_tokens=12
    )
    stream = await async_client.chat.completions.create(
        model=daemon.model, messages=ASK, temperature=0, max_tokens=12, stream=True
    )
    parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(parts) == whole.choices[0].message.content


async def test_twenty_clients_at_once(async_client: openai.AsyncOpenAI, daemon: RunningDaemon) -> None:
    async def ask(number: int) -> int:
        answer = await async_client.chat.completions.create(
            model=daemon.model, messages=[{"role": "user", "content": f"Say {number}."}], max_tokens=8
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    counts = await asyncio.gather(*(ask(number) for number in range(20)))
    assert all(1 <= count <= 8 for count in counts)


def test_models(client: openai.OpenAI, daemon: RunningDaemon) -> None:
    assert next(iter(client.models.list())).id == daemon.model
    assert client.models.retrieve(daemon.model).id == daemon.model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("missing")
