"""JSON schemas and tools through the official client: what was asked for is what comes, every time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from bench.schemas import SCHEMAS
from tests.conftest import RunningDaemon

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 24},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}
ASKED = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]


@pytest.fixture(scope="module")
def client(daemon: RunningDaemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=daemon.base_url, api_key="none", max_retries=0, timeout=100) as client:
        yield client


def ask(client: openai.OpenAI, **options: Any) -> Any:
    options = {"model": "default", "messages": ASKED, "temperature": 0, "max_tokens": 200, **options}
    return client.chat.completions.create(**options)


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_satisfies_its_schema(client: openai.OpenAI, name: str) -> None:
    schema = SCHEMAS[name]
    wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}
    answer = ask(
        client,
        messages=[{"role": "user", "content": f"Make up a {name}. Answer in JSON."}],
        response_format=wanted,
        max_tokens=400,
        temperature=0.8,
        seed=7,
    )
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content), schema)


def test_json_object(client: openai.OpenAI) -> None:
    answer = ask(client, response_format={"type": "json_object"}, max_tokens=300, frequency_penalty=0.5)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    else:
        assert answer.choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "strin"}, "response_format"),
        ({"$ref": "#/nowhere"}, "response_format"),
        ({"type": "string", "pattern": "("}, "response_format"),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, "response_format"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_a_400(client: openai.OpenAI, schema: Any, word: str) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}
    with pytest.raises(openai.BadRequestError, match=word):
        ask(client, response_format=wanted)


def test_a_hostile_schema_does_not_stop_the_daemon(client: openai.OpenAI, daemon: RunningDaemon) -> None:
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(200):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    bomb = {"type": "string", "pattern": "(((a{1,200}){1,200}){1,200}){1,200}"}
    for schema in (deep, bomb, {"enum": ["x" * 100] * 20000}):
        wanted: Any = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
        try:
            answer = ask(client, response_format=wanted, max_tokens=5)
            assert answer.choices[0].finish_reason in ("length", "stop")
        except openai.BadRequestError as error:
            assert "response_format" in str(error)
        except openai.InternalServerError as error:
            assert "too complex" in str(error)
    assert ask(client, max_tokens=2).choices[0].message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_tool_that_must_be_called_is(client: openai.OpenAI, choice: Any) -> None:
    answer = ask(client, tools=[WEATHER, CLOCK], tool_choice=choice, parallel_tool_calls=False)
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    assert call.id.startswith("call_")
    if choice != "required":
        assert call.function.name == "get_weather"
    if call.function.name == "get_weather":
        jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])


def test_streamed_tool_calls_add_up_to_the_whole_ones(client: openai.OpenAI) -> None:
    whole = ask(client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    name, arguments, ids, reasons = "", "", set(), set()
    for chunk in ask(client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, stream=True):
        for choice in chunk.choices:
            assert not choice.delta.content
            reasons.add(choice.finish_reason)
            for call in choice.delta.tool_calls or []:
                assert call.index == 0
                if call.id:
                    ids.add(call.id)
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    expected = whole.choices[0].message.tool_calls[0].function
    assert (name, arguments) == (expected.name, expected.arguments)
    assert len(ids) == 1
    assert reasons == {None, "tool_calls"}


def test_auto_allows_text_and_a_tool_result_goes_back(client: openai.OpenAI) -> None:
    first = ask(client, tools=[WEATHER], tool_choice="auto", max_tokens=60)
    message = first.choices[0].message
    assert message.content or message.tool_calls
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    }
    second = ask(
        client,
        tools=[WEATHER],
        tool_choice="none",
        max_tokens=30,
        messages=[
            *ASKED,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": '{"temperature": 21}'},
        ],
    )
    assert second.choices[0].message.content
    assert not second.choices[0].message.tool_calls


def test_none_never_calls(client: openai.OpenAI) -> None:
    assert not ask(client, tools=[WEATHER], tool_choice="none", max_tokens=30).choices[0].message.tool_calls


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools"),
        ({"messages": [{"role": "user"}]}, "content"),
        (
            {
                "messages": [
                    {"role": "user", "content": "x", "tool_calls": []},
                    {"role": "wizard", "content": ""},
                ]
            },
            "role",
        ),
    ],
)
def test_wrong_tools_are_a_400_that_names_them(client: openai.OpenAI, fields: Any, word: str) -> None:
    with pytest.raises(openai.BadRequestError, match=word):
        ask(client, **fields)
