"""Feedback over HTTP: what is kept, what is acknowledged, who sees it, and what survives."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from lichen.adapters.journal import Journal
from lichen.adapters.records import Record
from lichen.runtime.http.daemon import Daemon, DaemonOptions
from lichen.runtime.http.keys import KeyStore
from lichen.runtime.served_model import ServedModel
from tests.conftest import daemon_over, empty_pool

HELLO = [{"role": "user", "content": "Say hello."}]
CHAT: dict[str, Any] = {"messages": HELLO, "max_tokens": 4, "temperature": 0}
MOSS = [{"role": "user", "content": "What is moss?"}]
SAID: dict[str, Any] = {"messages": MOSS, "answer": "A bird.", "correction": "A plant."}

Client = TestClient[Any, Any]


@asynccontextmanager
async def client_of(daemon: Daemon) -> AsyncIterator[Client]:
    async with TestClient(TestServer(daemon.application())) as client:
        yield client
    if daemon.journal is not None:
        await daemon.journal.close()


def keeping(served: ServedModel, folder: Path, **options: Any) -> Any:
    """A client of a daemon with a model that keeps under `folder`."""
    return client_of(daemon_over(served, folder, **{"journal": "ask", "learning_folder": folder, **options}))


def without_model(folder: Path, **options: Any) -> Any:
    """A client of a daemon that still loads: feedback needs no model."""
    options = {"journal": "ask", "learning_folder": folder, **options}
    return client_of(Daemon(DaemonOptions(**options), empty_pool()))


async def ask(client: Client, method: str, path: str, status: int = 200, **more: Any) -> Any:
    """The JSON of an answer whose status must be this."""
    answer = await client.request(method, path, **more)
    body = await answer.json()
    assert answer.status == status, body
    return body


def records(folder: Path) -> list[Record]:
    with closing(Journal.open(folder / "journal.db")) as journal:
        return list(journal.records())


# What is kept


async def test_a_stored_answer_is_rated_and_corrected(served: ServedModel, tmp_path: Path) -> None:
    async with keeping(served, tmp_path) as client:
        answer = await ask(client, "POST", "/v1/chat/completions", json={**CHAT, "store": True})
        said = {"response_id": answer["id"], "rating": "down", "tags": ["tone", "tone"]}
        entry = await ask(client, "POST", "/v1/feedback", json=said)
        assert entry["id"].startswith("rec_")
        assert (entry["rating"], entry["tags"], entry["corrected"]) == ("down", ["tone"], False)
        more = {"response_id": answer["id"], "correction": "Hello, dear moss."}
        again = await ask(client, "POST", "/v1/feedback", json=more)
        assert (again["id"], again["rating"], again["corrected"]) == (entry["id"], "down", True)
        whole = await ask(client, "GET", f"/v1/feedback/{entry['id']}")
        assert whole["request"] == {"messages": HELLO}
        assert whole["answer"]["content"] == answer["choices"][0]["message"]["content"]
        assert whole["correction"] == "Hello, dear moss."
        metrics = await (await client.get("/metrics")).text()
        assert 'lichen_feedback_total{rating="down"} 1' in metrics
        assert 'lichen_feedback_total{rating="none"} 1' in metrics
        assert 'lichen_answers_kept_total{outcome="kept"} 1' in metrics
        assert "lichen_journal_bytes 0" not in metrics
    (record,) = records(tmp_path)
    assert (record.model, record.owner) == (served.info.name, "")


async def test_streams_several_choices_and_texts_are_kept(served: ServedModel, tmp_path: Path) -> None:
    async with keeping(served, tmp_path) as client:
        body = {**CHAT, "n": 2, "temperature": 1, "seed": 1, "store": True, "stream": True}
        text = await (await client.post("/v1/chat/completions", json=body)).text()
        id = text.partition('"id":"')[2].partition('"')[0]
        for choice in (0, 1):  # as soon as the stream has ended, it is there
            said = {"response_id": id, "choice": choice, "rating": "up"}
            await ask(client, "POST", "/v1/feedback", json=said)
        body = {"prompt": ["1, 2,", "a, b,"], "max_tokens": 2, "n": 2, "store": True}
        answer = await ask(client, "POST", "/v1/completions", json=body)
        await ask(
            client, "POST", "/v1/feedback", json={"response_id": answer["id"], "choice": 3, "rating": "up"}
        )
        gone = {"response_id": answer["id"], "choice": 4, "rating": "up"}
        await ask(client, "POST", "/v1/feedback", 404, json=gone)
        tokens = {"prompt": [1, 2, 3], "max_tokens": 1, "store": True}
        refused = await ask(client, "POST", "/v1/completions", 400, json=tokens)
        assert "token ids" in refused["error"]["message"]
    found = records(tmp_path)
    assert [(record.kind, record.choice) for record in found] == [
        *(("chat", n) for n in range(2)),
        *(("text", n) for n in range(4)),
    ]
    assert [record.request["prompt"] for record in found[2:]] == ["1, 2,", "1, 2,", "a, b,", "a, b,"]
    assert [record.answer["text"] for record in found[2:]] == [choice["text"] for choice in answer["choices"]]
    assert all(record.answer["content"] for record in found[:2])


async def test_nothing_is_written_unless_somebody_asks(served: ServedModel, tmp_path: Path) -> None:
    folder = tmp_path / "learning"
    async with keeping(served, folder) as client:
        for store in ({}, {"store": False}, {"store": None}):
            answer = await ask(client, "POST", "/v1/chat/completions", json={**CHAT, **store})
        assert not folder.exists()
        said = {"response_id": answer["id"], "rating": "up"}
        refused = await ask(client, "POST", "/v1/feedback", 404, json=said)
        assert refused["error"]["code"] == "not_kept"
        assert '"store": true' in refused["error"]["message"]
    async with keeping(served, folder, journal="off") as client:
        refused = await ask(client, "POST", "/v1/chat/completions", 400, json={**CHAT, "store": True})
        assert refused["error"]["param"] == "store"
        for method, path in (("POST", "/v1/feedback"), ("GET", "/v1/feedback"), ("GET", "/v1/files")):
            refused = await ask(client, method, path, 409, json=SAID if method == "POST" else None)
            assert refused["error"]["code"] == "journal_off"


async def test_a_setting_or_a_key_keeps_and_a_request_may_decline(
    served: ServedModel, tmp_path: Path
) -> None:
    async with keeping(served, tmp_path / "all", journal="all") as client:
        for store in ({}, {"store": False}, {"store": True}):
            await ask(client, "POST", "/v1/chat/completions", json={**CHAT, **store})
        await ask(client, "GET", "/v1/feedback")
    assert len(records(tmp_path / "all")) == 2
    keys = KeyStore(tmp_path / "keys.json")
    loud, quiet = keys.create("loud", keeps=True), keys.create("quiet")
    async with keeping(served, tmp_path / "key", keys_file=keys.path) as client:
        for key in (loud, quiet):
            headers = {"x-api-key": key}
            await ask(client, "POST", "/v1/chat/completions", json=CHAT, headers=headers)
            declined = {**CHAT, "store": False}
            await ask(client, "POST", "/v1/chat/completions", json=declined, headers=headers)
            page = await ask(client, "GET", "/v1/feedback", headers=headers)
            assert len(page["data"]) == (1 if key == loud else 0)
    (record,) = records(tmp_path / "key")
    assert record.owner == keys.list()[0].id


async def test_an_app_may_bring_what_was_said(tmp_path: Path) -> None:
    async with without_model(tmp_path) as client:
        entry = await ask(client, "POST", "/v1/feedback", json={**SAID, "model": "elsewhere"})
        assert entry["response_id"].startswith("app-")
        other = {**SAID, "response_id": "my-id:7", "rating": "down"}
        named = await ask(client, "POST", "/v1/feedback", json=other)
        assert named["id"] != entry["id"]
        assert (await ask(client, "POST", "/v1/feedback", json=other))["id"] == named["id"], "a retry"
    first, second = records(tmp_path)
    assert (first.source, first.model, first.answer["content"]) == ("app", "elsewhere", "A bird.")
    assert (second.response, second.rating) == ("my-id:7", "down")


# Refusals


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"rating": "up"}, "response_id"),
        ({"response_id": "r"}, "rating"),
        ({"response_id": "r", "tags": ["x"]}, "rating"),
        ({"response_id": "r", "rating": "great"}, "rating"),
        ({"response_id": "r", "rating": 1}, "rating"),
        ({"response_id": "", "rating": "up"}, "response_id"),
        ({"response_id": "../../etc/passwd", "rating": "up"}, "response_id"),
        ({"response_id": "r\u0000", "rating": "up"}, "response_id"),
        ({"response_id": "r", "choice": -1, "rating": "up"}, "choice"),
        ({"response_id": "r", "choice": 64, "rating": "up"}, "choice"),
        ({"response_id": "r", "choice": 1 << 70, "rating": "up"}, "choice"),
        ({"response_id": "r", "correction": ""}, "correction"),
        ({"response_id": "r", "correction": "x" * 100_001}, "correction"),
        ({"response_id": "r", "rating": "up", "tags": ["a b"]}, "tags"),
        ({"response_id": "r", "rating": "up", "tags": ["x"] * 17}, "tags"),
        ({"response_id": "r", "rating": "up", "mood": "x"}, "mood"),
        ({"response_id": "r", "rating": "up", "model": "x"}, "model"),
        ({"messages": MOSS, "rating": "up"}, "answer"),
        ({"answer": "x", "rating": "up"}, "messages"),
        ({"messages": [], "answer": "x", "rating": "up"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}], "answer": "x", "rating": "up"}, "messages"),
    ],
)
async def test_what_is_wrong_is_a_400_that_names_it(tmp_path: Path, body: Any, param: str) -> None:
    async with without_model(tmp_path / "learning") as client:
        refused = await ask(client, "POST", "/v1/feedback", 400, json=body)
        assert str(refused["error"]["param"]).startswith(param), refused
    assert not (tmp_path / "learning").exists(), "nothing is made for a bad request"


async def test_bad_queries_and_ids_are_refused(tmp_path: Path) -> None:
    async with without_model(tmp_path) as client:
        for path in ("?limit=0", "?limit=101", "?limit=x", "?mood=x"):
            await ask(client, "GET", f"/v1/feedback{path}", 400)
        for path in ("?after=rec_0", "/rec_0", "/%00", "/' OR 1=1 --"):
            await ask(client, "GET", f"/v1/feedback{path}", 404)
        await ask(client, "DELETE", "/v1/feedback/rec_0", 404)


async def test_pages_follow_each_other(tmp_path: Path) -> None:
    async with without_model(tmp_path) as client:
        ids = [(await ask(client, "POST", "/v1/feedback", json=SAID))["id"] for _ in range(5)]
        page = await ask(client, "GET", "/v1/feedback?limit=2")
        assert ([entry["id"] for entry in page["data"]], page["has_more"]) == (ids[:-3:-1], True)
        page = await ask(client, "GET", f"/v1/feedback?limit=3&after={ids[3]}")
        assert ([entry["id"] for entry in page["data"]], page["has_more"]) == (ids[2::-1], False)


async def test_a_key_sees_and_forgets_only_its_own(tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "keys.json")
    ann, bob = ({"x-api-key": keys.create(name)} for name in ("ann", "bob"))
    async with without_model(tmp_path, keys_file=keys.path, api_key="also") as client:
        said = {**SAID, "response_id": "same-id"}
        of_ann = await ask(client, "POST", "/v1/feedback", json={**said, "answer": "of ann"}, headers=ann)
        of_bob = await ask(client, "POST", "/v1/feedback", json={**said, "answer": "of bob"}, headers=bob)
        assert of_ann["id"] != of_bob["id"]
        for headers, mine, theirs in ((ann, of_ann, of_bob), (bob, of_bob, of_ann)):
            page = await ask(client, "GET", "/v1/feedback", headers=headers)
            assert [entry["id"] for entry in page["data"]] == [mine["id"]]
            foreign = f"/v1/feedback/{theirs['id']}"
            refused = await ask(client, "GET", foreign, 404, headers=headers)
            missing = await ask(client, "GET", "/v1/feedback/rec_0", 404, headers=headers)
            assert refused["error"]["code"] == missing["error"]["code"]
            await ask(client, "DELETE", foreign, 404, headers=headers)
            await ask(client, "GET", f"/v1/feedback?after={theirs['id']}", 404, headers=headers)
        assert (await ask(client, "GET", "/v1/feedback", headers={"x-api-key": "also"}))["data"] == []
        gone = await ask(client, "DELETE", f"/v1/feedback/{of_ann['id']}", headers=ann)
        assert gone == {
            "id": of_ann["id"],
            "object": "feedback.deleted",
            "deleted": True,
            "tainted_adapters": [],
        }
        assert b"of ann" not in b"".join(path.read_bytes() for path in tmp_path.glob("journal*"))
        whole = await ask(client, "GET", f"/v1/feedback/{of_bob['id']}", headers=bob)
        assert whole["answer"]["content"] == "of bob"


# What goes wrong


async def test_a_damaged_journal_is_put_aside_and_the_daemon_serves(
    served: ServedModel, tmp_path: Path
) -> None:
    (tmp_path / "journal.db").write_bytes(b"rubbish" * 1000)
    async with keeping(served, tmp_path) as client:
        answer = await ask(client, "POST", "/v1/chat/completions", json={**CHAT, "store": True})
        await ask(client, "POST", "/v1/feedback", json={"response_id": answer["id"], "rating": "up"})
    assert len(records(tmp_path)) == 1
    (aside,) = tmp_path.glob("journal.db.damaged-*")
    assert aside.read_bytes() == b"rubbish" * 1000


async def test_a_place_that_cannot_be_written_costs_only_the_feedback(
    served: ServedModel, tmp_path: Path
) -> None:
    folder = tmp_path / "learning"
    folder.write_text("a file where the folder should be")
    async with keeping(served, folder) as client:
        await ask(client, "POST", "/v1/chat/completions", json={**CHAT, "store": True})
        refused = await ask(client, "POST", "/v1/feedback", 500, json=SAID)
        assert str(tmp_path) not in refused["error"]["message"]
        metrics = await (await client.get("/metrics")).text()
        assert 'lichen_answers_kept_total{outcome="failed"} 1' in metrics
