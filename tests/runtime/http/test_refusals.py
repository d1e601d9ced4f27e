"""What the daemon refuses, and how: malformed, unsupported, hostile requests over a real socket."""

from __future__ import annotations

import socket
from typing import Any

import httpx
import pytest

from tests.conftest import RunningDaemon, StartDaemon

HELLO = [{"role": "user", "content": "Hello"}]
ANSWER = {"role": "assistant", "content": "Yes?"}
CALL: dict[str, Any] = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}


def refuse(daemon: RunningDaemon, path: str = "/v1/chat/completions", **request: Any) -> dict[str, Any]:
    answer = httpx.post(daemon.url + path, timeout=10, **request)
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return {"status": answer.status_code, **error}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls[0]"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -0.5}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"top_p": 7}, "top_p"),
        ({"n": 0}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"logprobs": 2}, "logprobs"),
        ({"logit_bias": {"one": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"frobnicate": 1}}, "stream_options.frobnicate"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"frobnicate": True}, "frobnicate"),
        ({"seed": 1 << 70}, None),
        ({"messages": [{**ANSWER, "refusal": "I will not."}]}, "messages[0].refusal"),
        ({"messages": [{**ANSWER, "audio": {"id": "audio_1"}}]}, "messages[0].audio"),
        ({"messages": [{**ANSWER, "annotations": [{"type": "url"}]}]}, "messages[0].annotations"),
        (
            {"messages": [{**ANSWER, "provider_specific_fields": "x"}]},
            "messages[0].provider_specific_fields",
        ),
        (
            {"messages": [{**ANSWER, "tool_calls": [{**CALL, "cache": True}]}]},
            "messages[0].tool_calls[0].cache",
        ),
    ],
)
def test_a_wrong_field_is_a_400_that_names_it(
    daemon: RunningDaemon, fields: dict[str, Any], param: str | None
) -> None:
    error = refuse(daemon, json={"messages": HELLO, **fields})
    assert error["status"] == 400
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    "fields", [{"n": 1}, {"tools": []}, {"logprobs": False}, {"user": "me"}, {"seed": None}]
)
def test_a_field_that_changes_nothing_is_accepted(daemon: RunningDaemon, fields: dict[str, Any]) -> None:
    body = {"messages": HELLO, "max_tokens": 1, **fields}
    assert httpx.post(f"{daemon.base_url}/chat/completions", json=body, timeout=20).status_code == 200


UNTOUCHED: dict[str, Any] = {"refusal": None, "annotations": [], "audio": None, "function_call": None}


@pytest.mark.parametrize(
    "extra", [None, {}, {"refusal": None, "citations": [1]}], ids=["null", "empty", "full"]
)
def test_an_answer_is_accepted_as_clients_send_it_back(daemon: RunningDaemon, extra: Any) -> None:
    kept = {"provider_specific_fields": extra}
    call = {**CALL, **kept, "index": None, "function": {**CALL["function"], **kept}}
    answer = {**ANSWER, **UNTOUCHED, **kept, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "noon"}
    body = {"messages": [*HELLO, answer, result]}
    plain = {"messages": [*HELLO, {**ANSWER, "tool_calls": [CALL]}, result]}
    prompts = [httpx.post(f"{daemon.url}/apply-template", json=sent, timeout=20) for sent in (body, plain)]
    assert prompts[0].status_code == 200, prompts[0].text
    assert prompts[0].json() == prompts[1].json()
    asked = httpx.post(f"{daemon.base_url}/chat/completions", json={**body, "max_tokens": 1}, timeout=20)
    assert asked.status_code == 200, asked.text


def test_fields_without_effect_are_those_of_openais_bodies(daemon: RunningDaemon) -> None:
    for path in ("/api/chat", "/tokenize", "/models/load"):
        answer = httpx.post(daemon.url + path, json={"model": "default", "user": "me"}, timeout=10)
        assert answer.status_code == 400
        assert "user" in answer.text


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": NaN}', b"[" * 100_000, b'{"a":' * 50_000]
)
def test_a_body_that_is_no_json_object_is_a_400(daemon: RunningDaemon, body: bytes) -> None:
    assert refuse(daemon, content=body)["status"] == 400


def test_a_body_over_the_limit_is_a_413(daemon: RunningDaemon) -> None:
    error = refuse(daemon, content=b" " * (9 << 20))
    assert (error["status"], error["code"]) == (413, "payload_too_large")


def test_a_prompt_over_the_context_is_a_400_with_both_numbers(daemon: RunningDaemon) -> None:
    error = refuse(daemon, json={"messages": [{"role": "user", "content": "word " * 5000}]})
    assert (error["status"], error["code"]) == (400, "context_length_exceeded")
    assert "4096" in error["message"]
    assert "50" in error["message"]


def test_an_unknown_model_route_or_method_says_so(daemon: RunningDaemon) -> None:
    error = refuse(daemon, json={"messages": HELLO, "model": "gpt-7"})
    assert (error["status"], error["param"]) == (404, "model")
    assert refuse(daemon, path="/v2/chat", json={})["status"] == 404
    assert httpx.put(f"{daemon.url}/health").status_code == 405


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": "localhost:1234"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Origin": "http://localhost:3000"}, 200),
    ],
)
def test_host_and_origin_are_checked(daemon: RunningDaemon, headers: dict[str, str], status: int) -> None:
    answer = httpx.get(f"{daemon.url}/v1/models", headers=headers)
    assert answer.status_code == status
    if status == 200 and "Origin" in headers:
        assert answer.headers["Access-Control-Allow-Origin"] == headers["Origin"]


def test_a_preflight_of_an_allowed_page_is_answered(daemon: RunningDaemon) -> None:
    answer = httpx.options(f"{daemon.base_url}/chat/completions", headers={"Origin": "http://localhost:3000"})
    assert answer.status_code == 204
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]


def test_bytes_that_are_no_http_do_not_disturb_the_daemon(daemon: RunningDaemon) -> None:
    host, _, port = daemon.url.removeprefix("http://").partition(":")
    for junk in (
        b"\x00" * 64,
        b"GET\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"A" * 70_000,
    ):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(junk)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(100)
    assert httpx.get(f"{daemon.url}/health").status_code == 200


def test_an_api_key_is_asked_for_and_compared(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--api-key", "s3cret", "--slots", "1", "--context", "256")
    assert httpx.get(f"{daemon.url}/health").status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
        answer = httpx.get(f"{daemon.url}/v1/models", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    answer = httpx.get(f"{daemon.url}/v1/models", headers={"Authorization": "Bearer s3cret"})
    assert answer.status_code == 200


def test_a_full_queue_is_a_429_with_retry_after(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--slots", "1", "--queue", "0", "--context", "1024")
    body = {"prompt": "Count: 1, 2, 3,", "max_tokens": 400, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{daemon.base_url}/completions", json=body, timeout=60) as running:
        lines = running.iter_lines()  # dropping it would close the connection
        next(lines)
        answer = httpx.post(f"{daemon.base_url}/completions", json=body, timeout=10)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert int(answer.headers["Retry-After"]) >= 1
    daemon.wait_idle()
