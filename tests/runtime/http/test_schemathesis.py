"""Requests made up from the OpenAPI document, valid and broken ones, against a real daemon.

For each answer: no server error, a documented status, content type and body, no hang; and a request that
breaks the document is refused. Answers are kept to a few tokens, so that many requests fit in a run.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from lichen.runtime.http.openapi import document
from lichen.runtime.http.route_table import ROUTES
from tests.conftest import RunningDaemon, StartDaemon

CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
FEW_TOKENS = 2
TEXTS = ("messages", "prompt", "input", "content")
MESSAGES = 2  # in a conversation
SHORT_TEXT = 10  # characters; exotic ones are several tokens each
LESSON = b'{"prompt": "1, 2,", "completion": " 3"}'
FEEDBACK = {"rating": "up", "messages": [{"role": "user", "content": "x"}], "answer": "y"}
HANG_S = 20.0  # an answer of a few tokens takes a fraction of a second
EXAMPLES = {"post": 16, "get": 3, "delete": 3}  # of each kind for each operation in the short run
SLOW_S = float(os.environ.get("FUZZ_SECONDS", "600"))

load_all_checks()
SCHEMA = schemathesis.openapi.from_dict(document())
SCHEMA.config.output.sanitization.update(enabled=False)  # a failure's request is shown as it was sent


def cheap(body: Any, fields: Collection[str]) -> Any:
    """The same body with a short answer, and more often one that reaches the engine. fields: its route's."""
    if not isinstance(body, dict):
        return body
    body = {name: _short(value) if name in TEXTS else value for name, value in body.items()}
    if isinstance(body.get("model"), str) and len(body["model"]) % 4:
        body["model"] = "default"
    return _shortly_answered(body) if "max_tokens" in fields else body


def _shortly_answered(body: dict[str, Any]) -> dict[str, Any]:
    for name in ("max_tokens", "max_completion_tokens"):
        if _is_count(body.get(name)):
            body[name] = min(body[name], FEW_TOKENS)
    if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        body["max_tokens"] = FEW_TOKENS
    if _is_count(body.get("n")) and body["n"] > 2:
        body["n"] = 2
    body.setdefault("stream", len(body) % 2 == 0)
    if isinstance(body.get("stream_options"), dict) and body.get("stream") in (None, False):
        body["stream"] = True
    if isinstance(body.get("logit_bias"), dict) and len(body["logit_bias"]) % 3:
        body["logit_bias"] = {str(token): bias for token, bias in enumerate(body["logit_bias"].values())}
    return body


def _short(value: Any) -> Any:
    """The value with its texts cut; lists stay, since what breaks a request may be their last item."""
    match value:
        case str():
            return value[:SHORT_TEXT]
        case list():
            return [_short(item) for item in value]
        case dict():
            return {name: _short(item) for name, item in value.items()}
        case _:
            return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@SCHEMA.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    assert context.operation is not None, "a body belongs to an operation"
    id = context.operation.definition.raw["operationId"]
    (route,) = (route for route in ROUTES if route.id == id)
    if route.upload:
        return {**body, "file": LESSON} if isinstance(body, dict) else body
    if id == "createFeedback" and isinstance(body, dict):  # rules between fields are not in the document
        return {**body, **{name: value for name, value in FEEDBACK.items() if body.get(name) is None}}
    return cheap(body, route.body.__struct_fields__ if route.body else ())


@pytest.fixture(scope="module")
def target(start_daemon: StartDaemon) -> Iterator[RunningDaemon]:
    """A daemon of its own, which must be idle and alive after everything."""
    target = start_daemon("--slots", "2", "--context", "256", "--threads", "1")
    yield target
    assert target.process.poll() is None
    target.wait_idle()


def _mended(body: dict[str, Any]) -> dict[str, Any]:
    """A valid body that also keeps the rules between fields, which are not in the document."""
    mended = dict(body)
    if isinstance(messages := body.get("messages"), list):
        mended["messages"] = [
            {name: value for name, value in message.items() if name != "tool_calls"}
            | {"content": message.get("content") or "x"}
            for message in messages[:MESSAGES]
        ]
    if isinstance(prompt := body.get("prompt"), list) and (not prompt or isinstance(prompt[0], str)):
        mended["prompt"] = [item for item in prompt if isinstance(item, str) and item] or "x"
    elif prompt == "":
        mended["prompt"] = "x"
    return mended


def ask(
    target: RunningDaemon, method: str, path: str, mode: GenerationMode, examples: int, by: int
) -> Counter[str]:
    """Make up requests for one operation and check the answers: how many "answered", how many "refused"."""
    answers: Counter[str] = Counter()
    operation = SCHEMA[path][method.upper()]

    @seed(by)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def requests(case: Any) -> None:
        asks = isinstance(case.body, dict) and not case.body.keys().isdisjoint(("messages", "prompt"))
        if mode == GenerationMode.POSITIVE and asks:
            case.body = _mended(case.body)
        headers = {"Authorization": "Bearer any"}  # an upload needs one
        response = case.call(base_url=target.url, timeout=HANG_S, headers=headers)
        case.validate_response(response, checks=CHECKS)
        answers["answered"] += response.status_code == 200
        answers["refused"] += 400 <= response.status_code < 500

    requests()
    return answers


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.id)
def test_valid_requests(target: RunningDaemon, route: Any) -> None:
    answers = ask(target, route.method, route.path, GenerationMode.POSITIVE, EXAMPLES[route.method], 1)
    # made-up names of models and ids of files
    named = route.parameters or route.id in ("ollamaShow", "ollamaPull", "createFineTuningJob")
    assert answers["answered"] or named, "requests reach the engine, else this test says little"


@pytest.mark.parametrize("route", [route for route in ROUTES if route.body], ids=lambda route: route.id)
def test_broken_requests(target: RunningDaemon, route: Any) -> None:
    answers = ask(target, route.method, route.path, GenerationMode.NEGATIVE, EXAMPLES[route.method], 2)
    assert answers["refused"] > EXAMPLES[route.method] // 2, answers


@given(
    st.dictionaries(
        st.sampled_from(["max_tokens", "n", "prompt", "x"]), st.integers() | st.none() | st.text()
    )
)
def test_no_request_is_made_expensive(body: dict[str, Any]) -> None:
    kept = cheap(body, {"max_tokens"})
    if isinstance(body.get("prompt"), str):
        assert len(kept["prompt"]) <= SHORT_TEXT
    assert not _is_count(kept.get("max_tokens")) or kept["max_tokens"] <= FEW_TOKENS
    assert kept["max_tokens"] is not None
    assert not _is_count(kept.get("n")) or kept["n"] <= 2
    assert cheap(body, ()).keys() == body.keys(), "no route gets a field that it does not know"


def test_long_messages_are_cut() -> None:
    def messages(length: int) -> list[Any]:
        return [{"role": "user", "content": "x" * length}, {"content": [1, {"text": "y" * length}]}, 7]

    assert cheap({"messages": messages(99)}, ())["messages"] == messages(SHORT_TEXT)


@pytest.mark.slow
def test_requests_for_ten_minutes(target: RunningDaemon) -> None:
    chance = random.Random()
    ends = time.monotonic() + SLOW_S
    kinds = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    answers: Counter[str] = Counter()
    work = [(route, kind) for route in ROUTES for kind in (kinds if route.body else kinds[:1])]
    while time.monotonic() < ends:
        for route, mode in work:
            by = chance.randrange(1 << 32)
            print(f"{route.id} {mode.value} seed {by}")  # pytest shows it when this fails
            answers += ask(target, route.method, route.path, mode, 10 * EXAMPLES[route.method], by)
    print(answers)
    assert min(answers["answered"], answers["refused"]) > 100, answers
