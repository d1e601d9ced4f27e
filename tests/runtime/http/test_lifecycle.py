"""A daemon's life: cut connections, answers under load, signals, sockets."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import statistics
import threading
import time
from pathlib import Path

import httpx
import pytest
from aiohttp.test_utils import TestClient, TestServer

from lichen.runtime.served_model import ServedModel
from lichen.sync.store import Store
from tests.conftest import RunningDaemon, StartDaemon, daemon_over, wait_ready

LONG = {"prompt": "Count: 1, 2, 3,", "max_tokens": 600, "temperature": 0, "stream": True}


async def test_two_hundred_clients_cut_at_random_moments_leak_nothing(daemon: RunningDaemon) -> None:
    chance = random.Random(11)
    before = daemon.wait_idle()
    tasks = daemon.status()["tasks"]

    async def cut(number: int) -> None:
        body = {
            **LONG,
            "prompt": f"Story {number}: " + "once " * chance.randrange(200),
            "stream": number % 3 > 0,
        }
        payload = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(payload)}\r\n\r\n"
        host, _, port = daemon.url.removeprefix("http://").partition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        request = head.encode() + payload
        writer.write(request[: len(request) if number % 5 else chance.randrange(len(request))])
        await asyncio.sleep(chance.random() * 1.5)
        writer.transport.abort()

    await asyncio.gather(*(cut(number) for number in range(200)))
    after = await asyncio.to_thread(daemon.wait_idle)
    assert after["free_slots"] == 8
    ended = sum(after[name] - before[name] for name in ("completed", "cancelled", "failed"))
    assert ended == after["requests"] - before["requests"] > 50
    assert after["failed"] == before["failed"]
    async with asyncio.timeout(10):
        while daemon.status()["tasks"] != tasks:
            await asyncio.sleep(0.1)
    body = {"prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 6}
    answer = httpx.post(f"{daemon.base_url}/completions", json=body, timeout=30).json()
    assert answer["choices"][0]["text"] == " 5, 6,"


def p99(times: list[float]) -> float:
    assert len(times) > 100
    return statistics.quantiles(times, n=100)[98]


def test_health_answers_during_a_long_prefill(daemon: RunningDaemon) -> None:
    """p99 under 50 ms while a prompt of about 2,000 tokens is computed."""
    prompt = {"prompt": "moss " * 2000 + str(time.time()), "max_tokens": 1}
    client = threading.Thread(
        target=lambda: httpx.post(f"{daemon.base_url}/completions", json=prompt, timeout=110)
    )
    client.start()
    times: list[float] = []
    with httpx.Client(base_url=daemon.url) as health:
        while client.is_alive() and len(times) < 1000:
            started = time.perf_counter()
            assert health.get("/health").status_code == 200
            times.append(time.perf_counter() - started)
            time.sleep(0.01)
    client.join()
    assert p99(times) < 0.05


async def test_health_answers_while_another_model_is_copied_and_hashed(
    served: ServedModel, model_path: Path, tmp_path: Path
) -> None:
    """p99 under 50 ms while the same event loop pulls and verifies a model."""
    daemon = daemon_over(served, tmp_path / "home")
    store = Store(tmp_path)

    async def pull_and_verify() -> None:
        await store.pull(f"file:{model_path}", name="second")
        for _ in range(8):
            await store.verify("second")

    times: list[float] = []
    async with TestClient(TestServer(daemon.application())) as client:
        work = asyncio.ensure_future(pull_and_verify())
        while not work.done() or len(times) <= 100:
            started = time.perf_counter()
            assert (await client.get("/health")).status == 200
            times.append(time.perf_counter() - started)
            await asyncio.sleep(0.002)
        await work
    assert p99(times) < 0.05


def test_a_shared_prefix_is_not_computed_again(daemon: RunningDaemon) -> None:
    shared = "The rules of the house are as follows. " * 110

    def ask(question: str) -> dict[str, float]:
        body = {"prompt": shared + question, "max_tokens": 1}
        timings: dict[str, float] = httpx.post(
            f"{daemon.base_url}/completions", json=body, timeout=60
        ).json()["timings"]
        return timings

    cold, warm = ask("May I sing?"), ask("Who cooks today?")
    assert cold["cached_tokens"] < 20
    assert warm["cached_tokens"] > 900
    assert warm["ttft_ms"] < cold["ttft_ms"] / 4, "a loose bound; the benchmark measures the real one"


def test_sigterm_drains(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--slots", "2", "--context", "1024")
    body = {**LONG, "max_tokens": 120}
    with httpx.stream("POST", f"{daemon.base_url}/completions", json=body, timeout=60) as running:
        lines = running.iter_lines()
        next(lines)
        daemon.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert httpx.get(f"{daemon.url}/health").json() == {"status": "draining"}
        refused = httpx.post(f"{daemon.base_url}/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        rest = list(lines)
    assert rest[-2] == "data: [DONE]"
    assert sum(line.startswith("data: {") for line in rest) > 100
    assert daemon.process.wait(20) == 0


def test_a_second_sigint_stops_at_once(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--slots", "2", "--context", "2048")
    with httpx.stream("POST", f"{daemon.base_url}/completions", json={**LONG, "max_tokens": 1900}) as running:
        lines = running.iter_lines()  # dropping it would close the connection
        next(lines)
        daemon.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert daemon.process.poll() is None, "the first one drains"
        started = time.monotonic()
        daemon.process.send_signal(signal.SIGINT)
        assert daemon.process.wait(10) == 0
        assert time.monotonic() - started < 5


def test_a_unix_socket(start_daemon: StartDaemon, tmp_path: Path) -> None:
    path = tmp_path / "lichen.sock"
    daemon = start_daemon("--uds", str(path), "--slots", "1", "--context", "256", wait=False)
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://any.name") as client:
        while client.get("/health").status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        answer = client.post(
            "/v1/completions", json={"prompt": "1, 2, 3,", "max_tokens": 3, "temperature": 0}
        )
    assert answer.json()["choices"][0]["text"] == " 4,"
    assert path.stat().st_mode & 0o777 == 0o600
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(20) == 0
    assert not path.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--host", "0.0.0.0"), "no API key is set"),
        (("--model", "/nowhere/model.gguf"), "model.gguf"),
        (("--slots", "0"), "slots"),
    ],
)
def test_a_daemon_that_cannot_start_says_why_in_one_sentence(
    start_daemon: StartDaemon, flags: tuple[str, ...], words: str
) -> None:
    daemon = start_daemon(*flags, wait=False)
    output = daemon.process.communicate(timeout=30)[0]
    assert daemon.process.returncode != 0
    assert words in output
    assert "Traceback" not in output


def test_a_port_in_use_is_said(start_daemon: StartDaemon, daemon: RunningDaemon) -> None:
    second = start_daemon("--port", daemon.url.rpartition(":")[2], wait=False)
    output = second.process.communicate(timeout=30)[0]
    assert second.process.returncode != 0
    assert "--port" in output


def test_wait_ready_would_notice_a_dead_daemon(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--slots", "0", wait=False)
    with pytest.raises(AssertionError, match="the daemon ended"):
        wait_ready(daemon)
