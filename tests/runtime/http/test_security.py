"""Safe by default: one test or more for each row of docs/security.md."""

from __future__ import annotations

import ast
import asyncio
import gzip
import re
import shutil
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp.test_utils import TestClient, TestServer

from lichen.cli.answering import daemon_client
from lichen.config import Config
from lichen.errors import ConfigError
from lichen.runtime.http.daemon import Daemon, DaemonOptions
from lichen.runtime.http.keys import KeyStore
from lichen.runtime.http.tls import server_context
from lichen.runtime.served_model import ServedModel
from tests.conftest import daemon_over, empty_pool
from tests.runtime.http.hostile import SECRET_PATH, address, drip, misbehaving, stall

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "security.md"
ROUTES = ["/health", "/version", "/status", "/v1/models", "/v1/chat/completions", "/nothing/here", "/"]


def call(daemon: Daemon, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=daemon.url, timeout=10, trust_env=False, **options)


# Keys


@pytest.mark.parametrize("by", ["setting", "store"])
async def test_every_route_but_health_needs_a_key(tmp_path: Path, by: str) -> None:
    store = KeyStore(tmp_path / "keys.json")
    secret = store.create("laptop") if by == "store" else "s3cret"
    options = {"keys_file": store.path} if by == "store" else {"api_key": secret}
    async with misbehaving(**options) as daemon, call(daemon) as client:
        assert (await client.get("/health")).json() == {"status": "loading"}
        for path in ROUTES[1:]:
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": f"Basic {secret}"},
                {"Authorization": "Bearer"},
                {"x-api-key": secret[:-1]},
                {"x-api-key": "\u00fc"},
            ):
                answer = await client.get(path, headers=httpx.Headers(headers, encoding="utf-8"))
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
                assert secret not in answer.text
            for headers in ({"Authorization": f"bearer {secret}"}, {"X-API-Key": secret}):
                assert (await client.get(path, headers=headers)).status_code != 401


async def test_a_key_revoked_in_another_process_stops_working(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first, second = KeyStore(path).create("first"), KeyStore(path).create("second")
    async with misbehaving(keys_file=path, api_key="also") as daemon, call(daemon) as client:

        async def status(key: str) -> int:
            return (await client.get("/version", headers={"x-api-key": key})).status_code

        assert [await status(key) for key in (first, second, "also")] == [200, 200, 200]
        KeyStore(path).revoke("first")
        await asyncio.sleep(1.1)
        assert [await status(key) for key in (first, second, "also")] == [401, 200, 200]


async def test_no_key_file_and_no_revoked_key_opens_the_daemon(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    async with misbehaving(keys_file=path) as daemon, call(daemon) as client:
        assert (await client.get("/version")).status_code == 200, "no key was ever made"
        KeyStore(path).create("only")
        KeyStore(path).revoke("only")
        await asyncio.sleep(1.1)
        assert (await client.get("/version")).status_code == 401
        path.unlink()
        await asyncio.sleep(1.1)
        assert (await client.get("/version")).status_code == 401


async def test_a_damaged_key_file_locks_and_tells_nobody_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret = KeyStore(path).create("only")
    async with misbehaving(keys_file=path, api_key="also") as daemon, call(daemon) as client:
        path.write_bytes(b'{"version": 1, "keys": [')
        await asyncio.sleep(1.1)
        answer = await client.get("/version", headers={"x-api-key": secret})
        assert answer.status_code == 503
        assert str(tmp_path) not in answer.text
        assert (await client.get("/version", headers={"x-api-key": "also"})).status_code == 200
    with pytest.raises(ConfigError, match="damaged"):
        Daemon(DaemonOptions(keys_file=path), empty_pool())


def test_beyond_loopback_needs_a_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(ConfigError, match="no API key is set"):
            Daemon(DaemonOptions(host=host, keys_file=path), empty_pool())
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        Daemon(DaemonOptions(host=host, keys_file=path), empty_pool())
    Daemon(DaemonOptions(host="0.0.0.0", api_key="s3cret"), empty_pool())
    Daemon(DaemonOptions(host="0.0.0.0", insecure_bind=True), empty_pool())
    KeyStore(path).create("phone")
    Daemon(DaemonOptions(host="0.0.0.0", keys_file=path), empty_pool())


# Web pages


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "localhost.evil.example"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "http://localhost.evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
@pytest.mark.parametrize(
    "kind", ["application/json", "text/plain", "application/x-www-form-urlencoded", None]
)
async def test_a_foreign_page_or_name_gets_403_on_every_path(
    headers: dict[str, str], kind: str | None
) -> None:
    if kind is not None:
        headers = {**headers, "Content-Type": kind}
    async with misbehaving() as daemon, call(daemon) as client:
        for path in ROUTES:
            for method in ("GET", "POST", "PUT", "OPTIONS", "DELETE"):
                answer = await client.request(method, path, content=b"{}", headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
                assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "text/plain; charset=utf-8",
        "application/x-www-form-urlencoded",
        "Multipart/Form-Data; boundary=x",
    ],
)
async def test_a_form_is_refused_even_without_an_origin(kind: str) -> None:
    async with misbehaving() as daemon, call(daemon) as client:
        for path in ("/echo", "/v1/chat/completions", "/nothing/here"):
            answer = await client.post(path, content=b"{}", headers={"Content-Type": kind})
            assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
        for headers in ({}, {"Content-Type": "application/json"}):
            assert (await client.post("/echo", content=b"{}", headers=headers)).content == b"{}"


# Too much, too slow


async def test_past_the_rate_is_a_429_for_that_key_only(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.json")
    ann, bob = store.create("ann"), store.create("bob")
    async with misbehaving(keys_file=store.path, rate_limit=3) as daemon, call(daemon) as client:

        async def ask(key: str) -> httpx.Response:
            return await client.get("/version", headers={"x-api-key": key})

        assert [(await ask(ann)).status_code for _ in range(4)] == [200, 200, 200, 429]
        refused = await ask(ann)
        assert refused.json()["error"]["code"] == "rate_limited"
        assert 1 <= int(refused.headers["Retry-After"]) <= 20
        assert [(await ask("guess")).status_code for _ in range(4)] == [401, 401, 401, 429]
        assert (await ask(bob)).status_code == 200
        assert (await client.get("/health")).status_code == 503, "the model is missing; it is not limited"


async def test_headers_that_drip_are_cut() -> None:
    async with misbehaving(read_timeout=0.5) as daemon:
        started = time.monotonic()
        await drip(daemon, b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"X-A: " + b"a" * 200, seconds=10)
        assert 0.3 < time.monotonic() - started < 3
        started = time.monotonic()  # the second request of a connection has no more time than the first
        await drip(
            daemon, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /" + b"a" * 200, seconds=10
        )
        assert 0.3 < time.monotonic() - started < 3


async def test_a_body_that_drips_is_cut() -> None:
    async with misbehaving(read_timeout=0.5) as daemon:
        started = time.monotonic()
        for path in (b"/echo", b"/nothing/here"):
            head = b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n"
            answer = await drip(daemon, head, b" " * 500, seconds=10)
            assert (b"408" if path == b"/echo" else b"404") in answer.splitlines()[0]
        assert time.monotonic() - started < 6


async def test_a_body_over_the_limit_or_badly_packed_is_refused() -> None:
    async with misbehaving(max_body=1024) as daemon, call(daemon) as client:
        answer = await client.post("/echo", content=b" " * 1025)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")
        answer = await client.post("/echo", content=b"junk", headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 400
        bomb = gzip.compress(b"0" * (64 << 20))[:1000]
        answer = await client.post("/echo", content=bomb, headers={"Content-Encoding": "gzip"})
        assert answer.status_code in (400, 413)


async def test_a_client_that_does_not_read_is_cut_and_holds_little_memory() -> None:
    async with misbehaving(write_timeout=1.0) as daemon:
        client = await stall(daemon, "/flood")
        async with call(daemon) as other:
            await asyncio.sleep(0.3)
            written = daemon.flooded
            assert (await other.get("/version")).status_code == 200, "others are not disturbed"
            await asyncio.sleep(0.2)
            assert daemon.ended == []
            assert 0 < daemon.flooded == written < 16 << 20, "the system's buffers, then it waits"
        async with asyncio.timeout(5):
            while not daemon.ended:
                await asyncio.sleep(0.05)
        client.close()
    assert daemon.ended == ["cut"]


async def test_a_client_that_reads_slowly_is_not_cut() -> None:
    async with misbehaving(write_timeout=1.0) as daemon:
        reader, writer = await asyncio.open_connection(*address(daemon), limit=65_536)
        writer.write(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for _ in range(25):
            assert await reader.read(1 << 20)
            await asyncio.sleep(0.1)
        assert daemon.ended == []
        writer.transport.abort()


async def test_a_request_that_takes_too_long_is_a_504_and_cancelled() -> None:
    async with misbehaving(request_timeout=0.3) as daemon, call(daemon) as client:
        answer = await client.get("/hang")
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timed_out")
        assert daemon.ended == ["cancelled"]
        lines = (await client.get("/stream")).text.split("\n\n")
        assert lines[0] == "data: 1"
        assert '"timed_out"' in lines[1]
        assert daemon.ended == ["cancelled"] * 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_late_answer_frees_its_slot(served: ServedModel, tmp_path: Path, stream: bool) -> None:
    daemon = daemon_over(served, tmp_path, request_timeout=0.5)
    before = served.engine.counters()
    body = {"prompt": "Count: 1, 2, 3,", "max_tokens": 1900, "temperature": 0, "stream": stream}
    async with TestClient(TestServer(daemon.application())) as client:
        answer = await client.post("/v1/completions", json=body)
        text = await answer.text()
    assert answer.status == (200 if stream else 504)
    assert "timed_out" in text
    assert "[DONE]" not in text
    async with asyncio.timeout(10):
        while (now := served.engine.counters()).running:
            await asyncio.sleep(0.05)
    assert (now.cancelled, now.free_slots) == (before.cancelled + 1, before.free_slots)


# Errors that tell too much


async def test_an_internal_error_shows_no_path_stack_or_token() -> None:
    async with misbehaving() as daemon, call(daemon) as client:
        answer = await client.get("/boom")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        begun = await client.get("/stream?fail=1")
        assert "internal_error" in begun.text
        for text in (answer.text, begun.text):
            for secret in (SECRET_PATH, "ann", "lk-", "Traceback", ".py", "line "):
                assert secret not in text
    junk = [
        b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nExpect: x\r\n\r\n",
    ]
    async with misbehaving() as daemon:
        for request in junk:
            text = (await drip(daemon, request, b"", seconds=10 if request != junk[-1] else 40)).decode()
            assert text.startswith("HTTP/1.")
            assert "Traceback" not in text
            assert "site-packages" not in text


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost that signs itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate of this test")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    words += f" -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout {key} -out {cert}"
    subprocess.run(["openssl", *words.split()], check=True, capture_output=True)
    return cert, key


async def test_tls(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    async with misbehaving(tls_cert=cert, tls_key=key) as daemon:
        host, port = address(daemon)
        assert daemon.url == f"https://127.0.0.1:{port}"
        async with daemon_client(Config(port=port, tls_cert=cert)) as client:
            assert (await client.get("/health")).status_code == 503
        async with httpx.AsyncClient(trust_env=False) as client:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await client.get(f"{daemon.url}/health")
            with pytest.raises(httpx.TransportError):
                await client.get(f"http://{host}:{port}/health")
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning):
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection(host, port, ssl=old)


def test_wrong_tls_files_are_one_clear_sentence(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = certificate
    junk, other, locked = (tmp_path / name for name in ("junk.pem", "other.pem", "locked.pem"))
    junk.write_bytes(b"\x00\xff" * 500)
    for words in (
        f"genpkey -algorithm ed25519 -out {other}",
        f"ec -in {key} -aes128 -passout pass:x -out {locked}",
    ):
        subprocess.run(["openssl", *words.split()], check=True, capture_output=True)
    for first, second, sentence in (
        (None, key, "tls_cert is not"),
        (tmp_path / "none.pem", key, "does not exist"),
        (cert, tmp_path, "is not a file"),
        (junk, key, "PEM"),
        (cert, junk, "PEM"),
        (cert, None, "PEM"),
        (cert, other, "does not belong"),
        (cert, locked, "without a password"),
    ):
        with pytest.raises(ConfigError, match=sentence) as caught:
            server_context(first, second)
        assert "\n" not in str(caught.value)
    assert server_context(None, None) is None


# The page


def test_every_row_of_the_threat_model_has_a_test_that_exists() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, test in named:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            names = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
            assert test in names, f"{file}::{test}"
