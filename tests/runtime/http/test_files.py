"""OpenAI's files API, driven by its own client, and by clients that mean harm."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from lichen.adapters import files as files_module
from lichen.adapters.journal import Journal
from lichen.adapters.registry import Registry
from lichen.errors import RegistryError
from lichen.runtime.http.daemon import Daemon, DaemonOptions
from lichen.runtime.http.keys import KeyStore
from tests.adapters.made_adapters import add_made
from tests.conftest import empty_pool
from tests.models.tiny_models import write_tiny
from tests.runtime.http.hostile import drip

LINES = b"".join(
    json.dumps({"prompt": f"Question {n}", "completion": f"Answer {n}"}).encode() + b"\n" for n in range(50)
)
KEY = {"Authorization": "Bearer x"}
FORM = {"purpose": "fine-tune"}


@asynccontextmanager
async def listening(folder: Path, **options: Any) -> AsyncIterator[Daemon]:
    """A daemon without a model that takes files."""
    options = {"journal": "ask", "learning_folder": folder, **options}
    daemon = Daemon(DaemonOptions(port=0, **options), empty_pool())
    async with daemon.listening():
        yield daemon


def client_of(daemon: Daemon, key: str = "any") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{daemon.url}/v1", api_key=key, max_retries=0)


async def test_the_official_client_uploads_lists_reads_and_deletes(tmp_path: Path) -> None:
    path = tmp_path / "lessons.jsonl"
    path.write_bytes(LINES)
    async with listening(tmp_path / "learning") as daemon, client_of(daemon) as client:
        with path.open("rb") as stream:
            file = await client.files.create(file=stream, purpose="fine-tune")
        assert (file.filename, file.bytes, file.purpose) == ("lessons.jsonl", len(LINES), "fine-tune")
        assert (file.object, file.status) == ("file", "processed")
        lessons = file.model_extra["lessons"] if file.model_extra else {}
        assert lessons["train"] + lessons["held_out"] == 50
        assert abs(file.created_at - time.time()) < 60
        assert (await client.files.retrieve(file.id)).id == file.id
        assert (await client.files.content(file.id)).content == LINES
        second = await client.files.create(file=("b.jsonl", LINES), purpose="fine-tune")
        assert {one.id async for one in client.files.list(limit=1)} == {file.id, second.id}
        assert [one.id async for one in client.files.list(purpose="fine-tune", order="asc")]
        assert (await client.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError, match="There is no file"):
            await client.files.retrieve(file.id)
        assert [one.id async for one in client.files.list()] == [second.id]
    left = sorted(path.name for path in (tmp_path / "learning" / "files").iterdir())
    assert left == [f"{second.id}.json", f"{second.id}.jsonl"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "learning" / "files").iterdir())


async def test_a_deleted_file_taints_what_learned_from_it(tmp_path: Path) -> None:
    async with listening(tmp_path) as daemon, client_of(daemon) as client:
        file = await client.files.create(file=("a.jsonl", LINES), purpose="fine-tune")
        with closing(Journal.open(tmp_path / "journal.db")) as journal, journal.writing():
            journal.used_in([file.id], "sha-a")
        gone = await client.files.delete(file.id)
        assert gone.model_extra == {"tainted_adapters": ["sha-a"]}
        with closing(Journal.open(tmp_path / "journal.db")) as journal:
            assert [taint.adapter for taint in journal.tainted()] == ["sha-a"]


async def test_no_version_is_promoted_again_that_learned_from_what_is_gone(tmp_path: Path) -> None:
    model, registry = write_tiny(tmp_path / "tiny.gguf", "llama"), Registry(tmp_path / "adapters")
    first, second = (add_made(registry, "mine", model, seed).digest for seed in (1, 2))
    folder = tmp_path / "learning"
    async with listening(folder, adapters_folder=registry.folder) as daemon, client_of(daemon) as client:
        file = await client.files.create(file=("a.jsonl", LINES), purpose="fine-tune")
        opinion = {"messages": [{"role": "user", "content": "?"}], "answer": "A.", "correction": "B."}
        async with httpx.AsyncClient(base_url=daemon.url, trust_env=False) as plain:
            record = (await plain.post("/v1/feedback", json=opinion)).json()["id"]
            with closing(Journal.open(folder / "journal.db")) as journal, journal.writing():
                journal.used_in([file.id], first)
                journal.used_in([record], second)
            await client.files.delete(file.id)
            assert set(registry.standing("mine").tainted) == {first}
            assert (await plain.delete(f"/v1/feedback/{record}")).json()["tainted_adapters"] == [second]
    assert set(registry.standing("mine").tainted) == {first, second}
    with pytest.raises(RegistryError, match="forgotten since"):
        registry.promote("mine", first)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no lesson"),
        (LINES + b"{", "line 51"),
        (LINES + b'{"prompt": "only"}', "no completion"),
        (b"\xff\xfe" + LINES, "not UTF-8"),
        (b"\x00" * 3_000_000, "longer than"),
    ],
)
async def test_bad_lines_are_refused_by_number_and_leave_nothing(
    tmp_path: Path, content: bytes, words: str
) -> None:
    async with listening(tmp_path) as daemon, client_of(daemon) as client:
        with pytest.raises(openai.BadRequestError, match=words) as caught:
            await client.files.create(file=("a.jsonl", content), purpose="fine-tune")
        assert caught.value.code == "bad_lessons"
    assert list((tmp_path / "files").iterdir()) == []


def part(name: str, content: bytes, more: str = "") -> bytes:
    head = f'--B\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + content + b"\r\n"


PURPOSE = part("purpose", b"fine-tune")
GOOD = part("file", LINES, '; filename="a.jsonl"')


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (GOOD + PURPOSE + b"--B--\r\n", 200, "a.jsonl"),
        (part("file", LINES, '; filename="../../etc/cron.d/x"') + PURPOSE + b"--B--\r\n", 200, '"x"'),
        (part("file", LINES, '; filename="x\x01"') + PURPOSE + b"--B--\r\n", 400, "form"),
        (part("file", LINES) + PURPOSE + b"--B--\r\n", 200, "file.jsonl"),
        (GOOD + b"--B--\r\n", 400, "purpose must be"),
        (GOOD + part("purpose", b"batch") + b"--B--\r\n", 400, "purpose must be"),
        (GOOD + part("purpose", b"x" * 5000) + b"--B--\r\n", 400, "too long"),
        (PURPOSE + b"--B--\r\n", 400, "file is required"),
        (GOOD + GOOD + PURPOSE + b"--B--\r\n", 400, "twice"),
        (GOOD + PURPOSE + part("expires_after", b"1") + b"--B--\r\n", 400, "expires_after"),
        (PURPOSE * 2 + GOOD + b"--B--\r\n", 400, "twice"),
        (b"no form at all", 400, ""),
        (b"", 400, ""),
        (GOOD + PURPOSE, 400, ""),
        (GOOD[:200], 400, ""),
    ],
)
async def test_forms_good_broken_and_hostile(tmp_path: Path, body: bytes, status: int, words: str) -> None:
    async with (
        listening(tmp_path) as daemon,
        httpx.AsyncClient(base_url=daemon.url, trust_env=False) as client,
    ):
        headers = {**KEY, "Content-Type": "multipart/form-data; boundary=B"}
        answer = await client.post("/v1/files", content=body, headers=headers)
        assert answer.status_code == status, answer.text
        assert words in answer.text
    kept = [path.suffix for path in (tmp_path / "files").iterdir()]
    assert sorted(kept) == ([".json", ".jsonl"] if status == 200 else [])


async def test_a_form_cannot_upload(tmp_path: Path) -> None:
    async with (
        listening(tmp_path) as daemon,
        httpx.AsyncClient(base_url=daemon.url, trust_env=False) as client,
    ):
        files = {"file": ("a.jsonl", LINES)}
        answer = await client.post("/v1/files", files=files, data=FORM)
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
        assert "Authorization" in answer.text
        for path in ("/v1/feedback", "/v1/files/", "/v1/files/x"):
            assert (await client.post(path, files=files, data=FORM, headers=KEY)).status_code == 415
        answer = await client.post(
            "/v1/files", files=files, data=FORM, headers={**KEY, "Origin": "http://evil.example"}
        )
        assert answer.status_code == 403
        answer = await client.post("/v1/files", json={"purpose": "fine-tune"})
        assert (answer.status_code, "multipart/form-data" in answer.text) == (400, True)
    assert not (tmp_path / "files").exists()


async def test_an_upload_that_drips_is_cut_and_leaves_nothing(tmp_path: Path) -> None:
    async with listening(tmp_path, read_timeout=0.5) as daemon:
        head = (
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer x\r\n"
            b"Content-Length: 9999\r\nContent-Type: multipart/form-data; boundary=B\r\n\r\n"
        )
        started = time.monotonic()
        answer = await drip(daemon, head + GOOD[:90], b" " * 500, seconds=10)
        assert b"408" in answer.splitlines()[0]
        assert time.monotonic() - started < 5
        assert list((tmp_path / "files").iterdir()) == []


async def test_an_upload_over_a_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = LINES * 400  # 920 kB, over what a body may have
    async with listening(tmp_path, max_body=1024) as daemon, client_of(daemon) as client:
        assert (await client.files.create(file=("a.jsonl", big), purpose="fine-tune")).bytes == len(big)
        monkeypatch.setattr(files_module, "MAX_FILE", 100_000)
        with pytest.raises(openai.APIStatusError, match="at most 100,000 bytes") as caught:
            await client.files.create(file=("a.jsonl", big), purpose="fine-tune")
        assert caught.value.status_code == 413
    async with listening(tmp_path / "small", files_limit=10_000) as daemon, client_of(daemon) as client:
        await client.files.create(file=("a.jsonl", LINES), purpose="fine-tune")
        with pytest.raises(openai.InternalServerError, match="no room") as full:
            await client.files.create(file=("a.jsonl", LINES * 10), purpose="fine-tune")
        assert full.value.status_code == 507
        assert len([one async for one in client.files.list()]) == 1
    assert not list(tmp_path.rglob("*.part"))


async def test_a_key_sees_and_deletes_only_its_own_files(tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "keys.json")
    secrets = keys.create("ann"), keys.create("bob")
    async with (
        listening(tmp_path, keys_file=keys.path) as daemon,
        client_of(daemon, secrets[0]) as ann,
        client_of(daemon, secrets[1]) as bob,
        client_of(daemon, "wrong") as stranger,
    ):
        file = await ann.files.create(file=("a.jsonl", LINES), purpose="fine-tune")
        assert [one.id async for one in bob.files.list()] == []
        for act in (bob.files.retrieve, bob.files.content, bob.files.delete):
            with pytest.raises(openai.NotFoundError):
                await act(file.id)
        with pytest.raises(openai.AuthenticationError):
            await stranger.files.create(file=("a.jsonl", LINES), purpose="fine-tune")
        assert (await ann.files.content(file.id)).content == LINES
        assert (await ann.files.delete(file.id)).deleted


async def test_an_id_never_becomes_a_path(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "secret.json").write_text("{}")
    async with (
        listening(tmp_path) as daemon,
        httpx.AsyncClient(base_url=daemon.url, trust_env=False) as client,
    ):
        for id in ("..%2fsecret", "file-..%2f..%2fsecret", "%00", "file-" + "0" * 24, "x" * 5000):
            for path in (f"/v1/files/{id}", f"/v1/files/{id}/content"):
                assert (await client.get(path)).status_code == 404, path
            assert (await client.delete(f"/v1/files/{id}")).status_code == 404
        for query in ("?limit=0", "?order=up", "?purpose=batch", "?mood=x", "?after=x"):
            assert (await client.get(f"/v1/files{query}")).status_code == 400, query


async def test_a_crashed_upload_is_swept_and_a_damaged_description_hides_one_file(tmp_path: Path) -> None:
    import os

    async with listening(tmp_path) as daemon, client_of(daemon) as client:
        file, other = [
            await client.files.create(file=("a.jsonl", LINES), purpose="fine-tune") for _ in range(2)
        ]
        folder = tmp_path / "files"
        for name in ("old.part", "file-" + "1" * 24 + ".jsonl", "new.part"):
            (folder / name).write_bytes(b"half")
            if name != "new.part":
                os.utime(folder / name, (0, 0))
        (folder / f"{other.id}.json").write_bytes(b"{")
        await client.files.create(file=("b.jsonl", LINES), purpose="fine-tune")
        assert not (folder / "old.part").exists()
        assert not (folder / ("file-" + "1" * 24 + ".jsonl")).exists()
        assert (folder / "new.part").exists(), "it may still arrive"
        listed = [one.id async for one in client.files.list()]
        assert file.id in listed
        assert other.id not in listed
        with pytest.raises(openai.InternalServerError, match="cannot be read"):
            await client.files.retrieve(other.id)


async def test_the_loop_stays_free_during_an_upload(tmp_path: Path) -> None:
    async with listening(tmp_path) as daemon, client_of(daemon) as client:
        work = client.files.create(file=("a.jsonl", LINES * 2000), purpose="fine-tune")
        upload = asyncio.ensure_future(work)
        longest, last = 0.0, time.monotonic()
        while not upload.done():
            await asyncio.sleep(0.005)
            now = time.monotonic()
            longest, last = max(longest, now - last), now
        assert (await upload).bytes == 2000 * len(LINES)
        assert longest < 0.5
