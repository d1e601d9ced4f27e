"""The official `ollama` package against the daemon, every route that apps use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest

from tests.conftest import RunningDaemon

ASKED = [{"role": "user", "content": "Name three colours."}]
FEW: dict[str, Any] = {"num_predict": 12, "temperature": 0}
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(daemon: RunningDaemon) -> Iterator[ollama.Client]:
    client: Any = ollama.Client(host=daemon.url, timeout=60)
    yield client
    client.close()


def test_chat_whole_and_streamed(client: ollama.Client) -> None:
    whole = client.chat("default", ASKED, options=FEW)
    assert whole.message.role == "assistant"
    assert whole.message.content
    assert (whole.done, whole.done_reason, whole.eval_count) == (True, "length", 12)
    assert whole.total_duration and whole.eval_duration and whole.prompt_eval_count
    parts = list(client.chat("default", ASKED, options=FEW, stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]


def test_generate_whole_streamed_raw_and_with_a_system_message(client: ollama.Client) -> None:
    whole = client.generate("default", "Name three colours.", system="Be brief.", options=FEW)
    parts = client.generate("default", "Name three colours.", system="Be brief.", options=FEW, stream=True)
    assert "".join(part.response or "" for part in parts) == whole.response
    raw = client.generate("default", "1, 2, 3,", raw=True, options={**FEW, "num_predict": 3})
    assert raw.response == " 4,"


@pytest.mark.parametrize("stream", [False, True])
def test_a_format_and_a_tool(client: Any, stream: bool) -> None:
    options = {"temperature": 0, "num_predict": 80}

    def last(**more: Any) -> tuple[str, list[Any]]:
        answer: Any = client.chat("default", ASKED, options=options, stream=stream, **more)
        parts = list(answer) if stream else [answer]
        calls = [call for part in parts for call in part.message.tool_calls or []]
        return "".join(part.message.content or "" for part in parts), calls

    text, _ = last(format=SCHEMA)
    assert 1 <= json.loads(text)["n"] <= 9
    tool = {"type": "function", "function": {"name": "pick", "description": "Pick.", "parameters": SCHEMA}}
    text, calls = last(tools=[tool])
    assert text or calls
    for call in calls:
        assert call.function.name == "pick"
        assert 1 <= call.function.arguments["n"] <= 9


def test_a_conversation_with_a_tool_result_goes_back(client: ollama.Client) -> None:
    call = {"function": {"name": "pick", "arguments": {"n": 3}}}
    messages: Any = [
        *ASKED,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_name": "pick", "content": "3"},
    ]
    assert client.chat("default", messages, options=FEW).message.content


def test_embed(client: ollama.Client) -> None:
    answer = client.embed("default", ["moss", "a stone"])
    assert len(answer.embeddings) == 2
    assert sum(x * x for x in answer.embeddings[0]) == pytest.approx(1, rel=1e-4)
    with pytest.raises(ollama.ResponseError, match="dimensions"):
        client.embed("default", "moss", dimensions=7)


def test_tags_ps_show_and_version(client: ollama.Client, daemon: RunningDaemon) -> None:
    assert daemon.model in {model.model for model in client.list().models}
    assert [model.model for model in client.ps().models] == [daemon.model]
    shown = client.show(daemon.model)
    assert shown.capabilities == ["completion", "embedding"], "its template knows no tools and no reasoning"
    (card,) = httpx.get(f"{daemon.url}/v1/models").json()["data"][:1]
    assert card["capabilities"] == ["completion", "chat", "embedding", "json_schema"]
    tagged = httpx.get(f"{daemon.url}/api/tags").json()["models"][0]
    assert tagged["capabilities"] == shown.capabilities
    assert shown.template and "<|im_start|>" in shown.template
    assert httpx.get(f"{daemon.url}/api/version").json()["version"]


def test_a_request_without_a_prompt_loads_the_model(client: ollama.Client) -> None:
    assert client.generate("default", "").done_reason == "load"


def test_a_tag_that_clients_add_is_understood(client: ollama.Client, daemon: RunningDaemon) -> None:
    assert client.generate(f"{daemon.model}:latest", "Hi", options=FEW).response


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("chat", {"model": "nothing-here", "messages": ASKED}, 404, "nothing-here"),
        ("chat", {"messages": ASKED}, 400, "model"),
        ("chat", {"model": "default", "messages": ASKED, "options": {"tfs_z": 2}}, 400, "options.tfs_z"),
        ("chat", {"model": "default", "messages": ASKED, "options": {"num_ctx": 10**6}}, 400, "1000000"),
        ("chat", {"model": "default", "messages": ASKED, "options": {"frobnicate": 1}}, 400, "frobnicate"),
        ("chat", {"model": "default", "messages": [{"role": "user", "images": ["aGk="]}]}, 400, "images"),
        ("generate", {"model": "default", "prompt": "x", "suffix": "y"}, 400, "suffix"),
        ("generate", {"model": "default", "prompt": "x", "keep_alive": "soon"}, 400, "keep_alive"),
        ("generate", {"model": "default", "prompt": "x", "format": "xml"}, 400, "format"),
        ("embed", {"model": "default", "input": []}, 200, "embeddings"),
        ("embed", {"model": "default", "input": "moss " * 9000, "truncate": False}, 400, "tokens"),
        ("pull", {"model": "file:/etc/passwd"}, 403, "catalog"),
        ("pull", {"model": "http://127.0.0.1:1/x.gguf"}, 403, "catalog"),
        ("show", {"model": "../../etc/passwd"}, 404, "passwd"),
        ("show", {}, 400, "model"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_this_apis_words(
    daemon: RunningDaemon, path: str, body: dict[str, Any], status: int, word: str
) -> None:
    answer = httpx.post(f"{daemon.url}/api/{path}", json=body, timeout=60)
    assert answer.status_code == status
    assert word in answer.text
    if status != 200:
        assert isinstance(answer.json()["error"], str)


def test_a_pull_tells_its_progress(start_daemon: Any, model_path: Any, lichen_home: Any) -> None:
    """The model is there already, so that the test needs no network."""
    daemon = start_daemon("--slots", "1", "--context", "256")
    client: Any = ollama.Client(host=daemon.url, timeout=60)
    try:
        steps = list(client.pull("smollm2-135m", stream=True))
        assert steps[-1].status == "success"
        with pytest.raises(ollama.ResponseError, match="neither"):
            list(client.pull("no-such-model", stream=True))
    finally:
        client.close()
