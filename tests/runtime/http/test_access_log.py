"""The request log and request ids."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from lichen.runtime.http.keys import KeyStore
from lichen.runtime.http.log_format import JsonFormatter, configure_logging
from tests.runtime.http.hostile import drip, misbehaving, stall

LINE = re.compile(r"(\S+) (\S+) (\d+) ([\d.]+)ms (\d+)B key=(\S+) adapter=- request=(\S+)")


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level(logging.INFO, logger="lichen")
    yield caplog


def access(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "lichen.access"]


async def test_a_line_has_what_it_should_and_no_secret(
    lines: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    store = KeyStore(tmp_path / "keys.json")
    secret = store.create("laptop")
    async with (
        misbehaving(keys_file=store.path, api_key="s3cret") as daemon,
        httpx.AsyncClient(base_url=daemon.url, headers={"x-api-key": secret}) as client,
    ):
        await client.post("/echo?token=hush", json={"content": "private"}, headers={"X-Request-Id": "mine-1"})
        await client.get("/none", headers={"x-api-key": "s3cret"})
        await client.get("/version", headers={"x-api-key": "guess"})
        await client.get("/boom")
        await client.get("/a%0Ab\u00e9" + "c" * 500)
    found = [LINE.fullmatch(line) for line in access(lines)]
    assert all(found)
    parts = [match.groups() for match in found if match]
    key = store.list()[0].id
    assert [(p[0], p[1], p[2], p[5]) for p in parts[:4]] == [
        ("POST", "/echo", "200", key),
        ("GET", "/none", "404", "setting"),
        ("GET", "/version", "401", "-"),
        ("GET", "/boom", "500", key),
    ]
    assert parts[0][6] == "mine-1"
    assert int(parts[0][4]) > 20
    assert parts[4][1].startswith("/a%0Ab%C3%A9ccc")
    assert len(parts[4][1]) < 220
    for hidden in (secret, "s3cret", "guess", "hush", "private"):
        assert hidden not in "\n".join(access(lines))


async def test_a_request_id_is_the_clients_when_it_is_sane(lines: pytest.LogCaptureFixture) -> None:
    async with misbehaving() as daemon, httpx.AsyncClient(base_url=daemon.url) as client:
        for path in ("/health", "/none", "/boom", "/stream?fail=1"):
            answer = await client.get(path, headers={"X-Request-Id": "abc_1.2-3"})
            assert answer.headers["X-Request-Id"] == "abc_1.2-3"
        seen = set()
        for given in ("", "x" * 65, "a b", "<script>", "a;b", "\u00fc".encode()):
            answer = await client.get(
                "/health", headers=[(b"X-Request-Id", given if isinstance(given, bytes) else given.encode())]
            )
            assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-Id"])
            seen.add(answer.headers["X-Request-Id"])
        assert len(seen) == 6


async def test_a_client_that_leaves_and_one_that_speaks_no_http_have_lines(
    lines: pytest.LogCaptureFixture,
) -> None:
    async with misbehaving() as daemon:
        client = await stall(daemon, "/hang")
        await asyncio.sleep(0.2)
        client.close()
        await drip(daemon, b"\x00\x01\r\n\r\n", b"", seconds=5)
        async with asyncio.timeout(5):
            while len(access(lines)) < 2:
                await asyncio.sleep(0.02)
    assert any(line.startswith("GET /hang 499") for line in access(lines))
    assert any(" 400 " in line for line in access(lines))


async def test_json_lines_hold_the_request_id() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("lichen")
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        async with misbehaving() as daemon, httpx.AsyncClient(base_url=daemon.url) as client:
            await client.get("/boom", headers={"X-Request-Id": "one"})
        logger.info("evil\n%s", "\u2028 line")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    failed, line, plain = (json.loads(text) for text in stream.getvalue().splitlines())
    assert failed["request_id"] == line["request_id"] == "one"
    assert (failed["level"], failed["logger"]) == ("error", "lichen.http")
    assert "RuntimeError" in failed["exception"]
    assert (line["method"], line["path"], line["status"]) == ("GET", "/boom", 500)
    assert set(line) >= {"time", "level", "logger", "message", "request_id", "ms", "bytes", "key"}
    assert plain["request_id"] is None
    assert plain["message"] == "evil\n\u2028 line"


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_form_of_lines_is_a_setting(
    form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    configure_logging("info", form)  # type: ignore[arg-type]
    root.warning("hello")
    line = capsys.readouterr().err.strip()
    assert line.endswith("WARNING root: hello") if form == "text" else json.loads(line)["message"] == "hello"
