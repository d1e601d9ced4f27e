"""The OpenAPI document against itself, against the daemon's routes, and against the daemon's answers."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lichen.errors import RequestError
from lichen.runtime.http.daemon import Daemon, DaemonOptions
from lichen.runtime.http.ignored import REQUEST
from lichen.runtime.http.openapi import LIMITS, document
from lichen.runtime.http.route_table import ROUTES
from lichen.runtime.http.schema import ChatBody, CompletionBody, parse
from lichen.runtime.sequence import SamplingOptions
from tests.conftest import RunningDaemon, StartDaemon, empty_pool

HELLO = [{"role": "user", "content": "Hello"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "greet",
            "parameters": {
                "type": "object",
                "properties": {"loud": {"type": "boolean"}},
                "required": ["loud"],
                "additionalProperties": False,
            },
        },
    }
]
DOCUMENT = document()


def closed(of: dict[str, Any]) -> dict[str, Any]:
    """The document with no place for fields that it does not name."""
    strict = copy.deepcopy(of)
    for component in strict["components"]["schemas"].values():
        if "properties" in component:
            component["additionalProperties"] = False
    return strict


STRICT = closed(DOCUMENT)


def check(value: Any, schema: dict[str, Any], within: dict[str, Any] = STRICT) -> None:
    """Raise ValidationError unless the value is what the schema says."""
    jsonschema.Draft202012Validator({**schema, "components": within["components"]}).validate(value)


def answer_schema(method: str, path: str, status: int, kind: str = "application/json") -> dict[str, Any]:
    response = STRICT["paths"][path][method]["responses"][str(status)]
    if "$ref" in response:
        response = STRICT["components"]["responses"][response["$ref"].rpartition("/")[2]]
    found: dict[str, Any] = response["content"][kind]
    return found


def body_of(kind: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{kind}"}


def fits(body: dict[str, Any], kind: str) -> bool:
    try:
        check(body, body_of(kind), DOCUMENT)
    except jsonschema.ValidationError:
        return False
    return True


def test_it_is_an_openapi_document() -> None:
    for component in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(component)
    text = msgspec.json.encode(DOCUMENT).decode()
    for reference in set(re.findall(r'"\$ref":"#/([^"]+)"', text)):
        place: Any = DOCUMENT
        for step in reference.split("/"):
            place = place[step]
    ids = [route.id for route in ROUTES]
    assert len(set(ids)) == len(ids)


def test_every_route_of_the_daemon_is_documented_and_no_other() -> None:
    served = {
        (route.method.lower(), re.sub(r":[^}]*}", "}", route.resource.canonical))
        for route in Daemon(DaemonOptions(), empty_pool()).application().router.routes()
        if route.method != "HEAD" and route.resource is not None
    }
    assert served == {(route.method, route.path) for route in ROUTES}


def test_the_daemon_serves_it(daemon: RunningDaemon) -> None:
    answer = httpx.get(f"{daemon.url}/openapi.json")
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.json() == DOCUMENT


@pytest.mark.parametrize("path", [route.path for route in ROUTES if route.method == "get"])
def test_answers_to_get_are_as_documented(daemon: RunningDaemon, path: str) -> None:
    answer = httpx.get(daemon.url + path.replace("{name}", daemon.model))
    assert answer.status_code == 200
    kind = answer.headers["Content-Type"].partition(";")[0]
    if kind == "application/json":
        check(answer.json(), answer_schema("get", path, 200)["schema"])
    else:
        assert answer_schema("get", path, 200, kind)


ANSWERS = [
    ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 4}),
    ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 40, "stop": ["e"], "user": "me"}),
    ("/v1/completions", {"prompt": "1, 2, 3,", "max_tokens": 4}),
    (
        "/v1/chat/completions",
        {"messages": HELLO, "max_tokens": 3, "n": 2, "logprobs": True, "top_logprobs": 2},
    ),
    ("/v1/completions", {"prompt": ["1, 2,", "a, b,"], "max_tokens": 3, "logprobs": 2}),
    (
        "/v1/chat/completions",
        {"messages": HELLO, "max_tokens": 60, "temperature": 0, "tool_choice": "required", "tools": TOOLS},
    ),
]


@pytest.mark.parametrize(("path", "body"), ANSWERS)
def test_whole_answers_are_as_documented(daemon: RunningDaemon, path: str, body: dict[str, Any]) -> None:
    answer = httpx.post(daemon.url + path, json=body, timeout=30)
    assert answer.status_code == 200
    check(answer.json(), answer_schema("post", path, 200)["schema"])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": ["moss", "fern"]}),
        ("/v1/embeddings", {"input": "moss", "encoding_format": "base64"}),
        ("/tokenize", {"content": "moss 🌿"}),
        ("/tokenize", {"content": "moss 🌿", "with_pieces": True}),
        ("/detokenize", {"tokens": [33, 34]}),
        ("/apply-template", {"messages": HELLO}),
    ],
)
def test_other_answers_are_as_documented(daemon: RunningDaemon, path: str, body: dict[str, Any]) -> None:
    answer = httpx.post(daemon.url + path, json=body, timeout=30)
    assert answer.status_code == 200
    check(answer.json(), answer_schema("post", path, 200)["schema"])


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize(("path", "body"), ANSWERS)
def test_events_are_as_documented(
    daemon: RunningDaemon, path: str, body: dict[str, Any], usage: bool
) -> None:
    streamed = {**body, "stream": True, "stream_options": {"include_usage": usage}}
    answer = httpx.post(daemon.url + path, json=streamed, timeout=30)
    event = answer_schema("post", path, 200, "text/event-stream")["schema"]
    schema = event["properties"]["data"]["anyOf"][1]["contentSchema"]["anyOf"][0]
    data = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    assert len(data) > 1
    for event in data:
        check(msgspec.json.decode(event), schema)


def refusals(daemon: RunningDaemon) -> Iterator[tuple[str, str, httpx.Response]]:
    chat = "/v1/chat/completions"
    yield "post", chat, httpx.post(daemon.url + chat, json={})
    yield "post", chat, httpx.post(daemon.url + chat, json={"messages": HELLO, "model": "none"})
    yield "post", chat, httpx.post(daemon.url + chat, content=b" " * (9 << 20))
    yield "get", "/v1/models/{name}", httpx.get(f"{daemon.base_url}/models/a/b")
    yield "get", "/status", httpx.get(f"{daemon.url}/status", headers={"Host": "evil.example"})


def test_refusals_are_as_documented(daemon: RunningDaemon) -> None:
    statuses = []
    for method, path, answer in refusals(daemon):
        statuses.append(answer.status_code)
        check(answer.json(), answer_schema(method, path, answer.status_code)["schema"])
    assert statuses == [400, 404, 413, 404, 403]


async def test_a_daemon_that_loads_answers_as_documented() -> None:
    from aiohttp.test_utils import TestClient, TestServer

    async with TestClient(TestServer(Daemon(DaemonOptions(), empty_pool()).application())) as client:
        for path in ("/health", "/status", "/v1/models"):
            answer = await client.get(path)
            check(await answer.json(), answer_schema("get", path, answer.status)["schema"])
            assert answer.status == (503 if path == "/health" else 200)


def test_without_a_key_the_documented_401(start_daemon: StartDaemon) -> None:
    locked = start_daemon("--api-key", "s3cret", "--slots", "1", "--context", "256")
    for route in ROUTES:
        answer = httpx.request(route.method, locked.url + route.path, json=None)
        if route.open:
            assert answer.status_code == 200
        else:
            check(answer.json(), answer_schema(route.method, route.path, 401)["schema"])


@pytest.mark.parametrize("name", REQUEST)
def test_a_field_without_effect_is_documented_as_it_is_accepted(name: str) -> None:
    for value in (None, True, False, 0, 1, "", "none", "auto", [], {}, {"type": "text"}, ["text"], "x", 2):
        body = {"messages": HELLO, name: value}
        try:
            parse(msgspec.json.encode(body), ChatBody)
        except RequestError:
            accepted = False
        else:
            accepted = True
        # JSON schema takes 1 for 1.0, and Python takes True for 1; the document says neither.
        assert fits(body, "ChatBody") == accepted, value


@pytest.mark.parametrize("name", LIMITS)
def test_ranges_are_those_that_the_engine_checks(name: str) -> None:
    low, high = LIMITS[name]
    whole = isinstance(low, int) and isinstance(high, int) and name in ("top_k", "max_tokens", "seed")
    step = 1 if whole else 1e-6
    for value, allowed in ((low, True), (high, True), (low - step, False), (high + step, False)):
        options = SamplingOptions(**{name: value})  # type: ignore[arg-type]
        try:
            options.check(100)
        except RequestError:
            assert not allowed
        else:
            assert allowed
        assert fits({"prompt": "x", name: value}, "CompletionBody") == allowed


any_json = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)
FIELDS = sorted({*CompletionBody.__struct_fields__, "messages", "user", "echo", "wizard"})


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # other work may slow the machine
@given(st.dictionaries(st.sampled_from(FIELDS), any_json, max_size=3))
def test_what_the_document_forbids_is_refused(fields: dict[str, Any]) -> None:
    """The other way round does not hold: rules between fields and texts are not in the document."""
    for kind, base in ((ChatBody, {"messages": HELLO}), (CompletionBody, {"prompt": "x"})):
        body = {**base, **fields}
        if fits(body, kind.__name__):
            continue
        with pytest.raises(RequestError):
            parse(msgspec.json.encode(body), kind).sampling().check(100)
