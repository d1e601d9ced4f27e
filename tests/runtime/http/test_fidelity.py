"""n, log-probabilities, several prompts, embeddings and the token routes, through the official client."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import RunningDaemon, StartDaemon

MESSAGES: Any = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture(scope="module")
def client(daemon: RunningDaemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=daemon.base_url, api_key="none", max_retries=0, timeout=100) as client:
        yield client


def test_n_answers_share_one_prefill(client: openai.OpenAI, daemon: RunningDaemon) -> None:
    before = daemon.counters()
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Tell me about lakes. " * 30}],
        n=4,
        max_tokens=8,
        seed=3,
    )
    after = daemon.counters()
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert answer.usage is not None
    prompt = answer.usage.prompt_tokens
    computed = (after["prompt_tokens"] - before["prompt_tokens"]) - (
        after["cached_tokens"] - before["cached_tokens"]
    )
    assert computed <= prompt + 3, "the other three start from the first one's cells"
    assert answer.usage.completion_tokens == after["completion_tokens"] - before["completion_tokens"]


def test_n_streamed_choices_are_the_whole_ones(client: openai.OpenAI) -> None:
    options: Any = {"model": "default", "messages": MESSAGES, "n": 3, "max_tokens": 10, "temperature": 0}
    whole = [choice.message.content for choice in client.chat.completions.create(**options).choices]
    texts = ["", "", ""]
    reasons: dict[int, str] = {}
    for chunk in client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert sorted(reasons) == [0, 1, 2]
    assert len(set(whole)) == 1 or texts == whole, "greedy choices differ only by a near-tie"


def test_several_prompts_in_one_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="default", prompt=["1, 2, 3,", "a, b, c,"], n=2, max_tokens=3, temperature=0
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text == " 4,"
    assert answer.choices[2].text == answer.choices[3].text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens < 2 * 16


def test_logprobs_add_up(client: openai.OpenAI) -> None:
    options: Any = {"model": "default", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=5)
    choice = answer.choices[0]
    assert choice.logprobs is not None
    tokens = choice.logprobs.content
    assert tokens is not None
    assert b"".join(bytes(token.bytes or []) for token in tokens).decode() == choice.message.content
    for token in tokens:
        assert len(token.top_logprobs) == 5
        assert token.logprob == token.top_logprobs[0].logprob, "greedy takes the likeliest"
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1 + 1e-6
        ordered = [top.logprob for top in token.top_logprobs]
        assert ordered == sorted(ordered, reverse=True)
    streamed: list[float] = []
    for chunk in client.chat.completions.create(**options, logprobs=True, stream=True):
        for part in chunk.choices:
            if part.logprobs is not None:
                streamed += [entry.logprob for entry in part.logprobs.content or []]
    assert streamed == pytest.approx([token.logprob for token in tokens], abs=0.05)


def test_logprobs_of_a_completion_and_a_stop_string(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="default", prompt="1, 2, 3,", max_tokens=12, temperature=0, logprobs=2, stop=["6"]
    )
    choice = answer.choices[0]
    assert choice.text == " 4, 5, "
    logprobs = choice.logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []).startswith(" 4, 5,")
    assert "6" not in "".join(logprobs.tokens or [])
    assert len(logprobs.tokens or []) == len(logprobs.token_logprobs or []) == len(logprobs.text_offset or [])
    assert all(len(top) == 2 for top in logprobs.top_logprobs or [])


def test_a_deterministic_request_repeats_to_the_bit_beside_others(
    client: openai.OpenAI, daemon: RunningDaemon
) -> None:
    def ask() -> tuple[str | None, list[float]]:
        answer = client.chat.completions.create(
            model="default", messages=MESSAGES, max_tokens=24, seed=5, temperature=1, logprobs=True,
            extra_body={"deterministic": True},
        )  # fmt: skip
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        return answer.choices[0].message.content, [token.logprob for token in logprobs.content or []]

    alone = ask()
    with httpx.stream(
        "POST",
        f"{daemon.base_url}/completions",
        json={"prompt": "Count: 1, 2, 3,", "max_tokens": 400, "temperature": 0, "stream": True},
        timeout=60,
    ) as neighbour:
        next(neighbour.iter_lines())
        assert ask() == alone
    assert ask() == alone


def test_embeddings_float_base64_and_batched(client: openai.OpenAI) -> None:
    texts = [
        "A cat sleeps on the sofa.",
        "A kitten naps on the couch.",
        "The stock market fell by two per cent.",
    ]
    answer = client.embeddings.create(model="default", input=texts, encoding_format="float")
    vectors = [entry.embedding for entry in answer.data]
    assert all(math.isclose(sum(x * x for x in vector), 1, rel_tol=1e-4) for vector in vectors)
    near, far = (sum(a * b for a, b in zip(vectors[0], other, strict=True)) for other in vectors[1:])
    assert near > far
    single = client.embeddings.create(model="default", input=texts[1], encoding_format="base64")
    raw: Any = single.data[0].embedding
    decoded = struct.unpack(f"<{len(vectors[1])}f", base64.b64decode(raw))
    assert decoded == pytest.approx(vectors[1], abs=1e-6)
    assert client.embeddings.create(model="default", input=texts[1]).data[0].embedding == pytest.approx(
        vectors[1], abs=1e-6
    )
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 15


def test_an_embedding_does_not_disturb_a_stream(client: openai.OpenAI, daemon: RunningDaemon) -> None:
    options: Any = {"prompt": "Count: 1, 2, 3,", "max_tokens": 40, "temperature": 0}
    alone = httpx.post(f"{daemon.base_url}/completions", json=options, timeout=60).json()["choices"][0][
        "text"
    ]
    with httpx.stream(
        "POST", f"{daemon.base_url}/completions", json={**options, "stream": True}, timeout=60
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        client.embeddings.create(model="default", input="moss " * 600)
        import json

        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events if event["choices"]) in alone


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"input": "x", "dimensions": 8}, "dimensions"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [99999999]}, "vocabulary"),
        ({"input": "moss " * 9000}, "tokens"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_a_wrong_embedding_request_is_a_400(daemon: RunningDaemon, body: Any, word: str) -> None:
    answer = httpx.post(f"{daemon.base_url}/embeddings", json=body, timeout=30)
    assert answer.status_code == 400
    assert word in answer.text


def test_an_embedding_is_truncated_only_when_asked(start_daemon: StartDaemon) -> None:
    small = start_daemon("--slots", "1", "--context", "256")
    body = {"input": "moss " * 300, "truncate": True}
    answer = httpx.post(f"{small.base_url}/embeddings", json=body, timeout=60).json()
    assert answer["usage"]["prompt_tokens"] == 256
    refused = httpx.post(f"{small.base_url}/embeddings", json={**body, "truncate": False}, timeout=60)
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_token_routes(daemon: RunningDaemon) -> None:
    with httpx.Client(base_url=daemon.url, timeout=30) as client:
        tokens = client.post("/tokenize", json={"content": "Héllo, moss 🌿"}).json()["tokens"]
        assert client.post("/detokenize", json={"tokens": tokens}).json() == {"content": "Héllo, moss 🌿"}
        pieces = client.post("/tokenize", json={"content": "Hello", "with_pieces": True}).json()["tokens"]
        assert "".join(piece["piece"] for piece in pieces) == "Hello"
        prompt = client.post("/apply-template", json={"messages": MESSAGES}).json()["prompt"]
        assert prompt.endswith("<|im_start|>assistant\n")
        assert "Name three colours." in prompt
        assert client.post("/detokenize", json={"tokens": [-1]}).status_code == 400
        assert client.post("/tokenize", json={"text": "x"}).status_code == 400
        assert client.post("/apply-template", json={"messages": []}).status_code == 400


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"deterministic": "yes"}, "deterministic"),
    ],
)
def test_wrong_options_are_named(client: openai.OpenAI, fields: dict[str, Any], word: str) -> None:
    with pytest.raises(openai.BadRequestError, match=word):
        client.chat.completions.create(model="default", messages=MESSAGES, extra_body=fields)
