"""litellm as a client: chat, streams, tools, JSON schemas, embeddings, n and log-probabilities.

It must find everything on this machine: any connection to another one fails the test.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from tests.conftest import RunningDaemon

# A foreign package's warnings are no faults of ours.
# Not beside the fast tests: litellm leaves event loops unclosed, and a test that runs later would be blamed.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

MESSAGES = [{"role": "user", "content": "What is the weather in Paris?"}]
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 16},
        "people": {"type": "integer", "minimum": 0, "maximum": 9999},
    },
    "required": ["city", "people"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 16}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(autouse=True)
def only_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets reach loopback addresses only."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1"), f"litellm calls {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="module")
def litellm() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        patch.setenv("LITELLM_TELEMETRY", "False")
        patch.setenv("HF_HUB_OFFLINE", "1")
        module = pytest.importorskip("litellm", reason="litellm is not installed", exc_type=ImportError)
        module.telemetry = False
        module.suppress_debug_info = True
        yield module
        module.in_memory_llm_clients_cache.flush_cache()


@pytest.fixture
def ask(litellm: Any, daemon: RunningDaemon) -> Any:
    """`litellm.completion` at the daemon, greedy."""

    def complete(**options: Any) -> Any:
        options = {"messages": MESSAGES, "temperature": 0, "max_tokens": 24, **options}
        return litellm.completion(
            model="openai/default",
            api_base=daemon.base_url,
            api_key="none",
            num_retries=0,
            timeout=60,
            **options,
        )

    return complete


def test_chat_and_the_same_streamed(ask: Any) -> None:
    whole = ask()
    content = whole.choices[0].message.content
    assert content
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.completion_tokens <= 24 < whole.usage.prompt_tokens + 24
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def called(ask: Any) -> tuple[Any, dict[str, Any]]:
    """A message that calls the tool, and the tool's answer to it."""
    answer = ask(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=80)
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city"}
    return message, {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 21}'}


def test_a_tool_is_called_and_its_result_goes_back(ask: Any) -> None:
    message, result = called(ask)
    call = message.model_dump(include={"role", "content", "tool_calls"})
    after = ask(messages=[*MESSAGES, call, result], tools=[WEATHER], tool_choice="none")
    assert after.choices[0].message.content
    assert not after.choices[0].message.tool_calls


def test_a_message_goes_back_as_litellm_made_it(ask: Any) -> None:
    message, result = called(ask)
    assert ask(messages=[*MESSAGES, message, result], tools=[WEATHER], tool_choice="none").choices


def test_a_streamed_tool_call_adds_up(ask: Any) -> None:
    name = arguments = ""
    reasons = set()
    for chunk in ask(
        tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=80, stream=True
    ):
        reasons.add(chunk.choices[0].finish_reason)
        for call in chunk.choices[0].delta.tool_calls or ():
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert (name, set(json.loads(arguments))) == ("get_weather", {"city"})
    assert reasons == {None, "tool_calls"}


def test_a_json_schema(ask: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    answer = ask(response_format=wanted, max_tokens=80)
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content), CITY)


def test_n_and_logprobs(ask: Any) -> None:
    answer = ask(n=2, logprobs=True, top_logprobs=3, max_tokens=6)
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        tokens = choice.logprobs.content
        assert b"".join(bytes(token.bytes) for token in tokens).decode() == choice.message.content
        assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in tokens)


def test_embeddings(litellm: Any, daemon: RunningDaemon) -> None:
    answer = litellm.embedding(
        model="openai/default", api_base=daemon.base_url, api_key="none", input=["moss", "lichen and stone"]
    )
    assert [entry["index"] for entry in answer.data] == [0, 1]
    assert all(math.isclose(sum(x * x for x in entry["embedding"]), 1, rel_tol=1e-3) for entry in answer.data)
    assert answer.usage.prompt_tokens > 2


def test_a_refusal_is_the_error_that_litellm_knows(litellm: Any, ask: Any) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        ask(temperature=-1)
    with pytest.raises(litellm.BadRequestError, match="context"):
        ask(messages=[{"role": "user", "content": "moss " * 9000}])
