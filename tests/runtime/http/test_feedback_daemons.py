"""Feedback against real daemons: `kill -9`, a full disk, and two of them over one journal."""

from __future__ import annotations

import asyncio
import random
import resource
import signal
import time
from pathlib import Path

import httpx
import pytest

from tests.conftest import RunningDaemon, StartDaemon
from tests.runtime.http.test_feedback import CHAT, SAID, records

KILLS = 5


@pytest.fixture(scope="module")
def apart(start_daemon: StartDaemon, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunningDaemon, Path]:
    """A daemon with a home of its own, and that home."""
    home = tmp_path_factory.mktemp("apart")
    return start_daemon("--slots", "2", "--context", "512", home=home), home


def test_a_full_disk_is_a_507_and_serving_goes_on(apart: tuple[RunningDaemon, Path]) -> None:
    daemon, _home = apart
    big = {**SAID, "answer": "m" * 50_000, "rating": "up"}
    pid, (_, hard) = daemon.process.pid, resource.getrlimit(resource.RLIMIT_FSIZE)
    with httpx.Client(base_url=daemon.url, timeout=30) as client:
        kept = client.post("/v1/feedback", json=SAID).json()["id"]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (400_000, hard))
        try:
            statuses = [client.post("/v1/feedback", json=big).status_code for _ in range(20)]
            assert 200 in statuses
            assert set(statuses[-5:]) == {507}
            refused = client.post("/v1/feedback", json=big).json()["error"]
            assert refused["code"] == "journal_full"
            assert "disk is full" in refused["message"]
            answer = client.post("/v1/chat/completions", json={**CHAT, "store": True})
            assert answer.status_code == 200
            upload = {"file": ("a.jsonl", b'{"prompt": "p", "completion": "c"}\n' + b"\n" * 500_000)}
            headers = {"Authorization": "Bearer x"}
            sent = client.post("/v1/files", files=upload, data={"purpose": "fine-tune"}, headers=headers)
            assert (sent.status_code, sent.json()["error"]["code"]) == (507, "journal_full")
        finally:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
        assert client.post("/v1/feedback", json=big).status_code == 200, "with room it works again"
        assert client.get(f"/v1/feedback/{kept}").status_code == 200
        found, after = 0, ""
        while page := client.get(f"/v1/feedback?limit=100{after}").json():
            found += len(page["data"])
            if not page["has_more"]:
                break
            after = f"&after={page['data'][-1]['id']}"
        assert found >= statuses.count(200) + 2


async def test_two_daemons_share_a_journal(
    start_daemon: StartDaemon, apart: tuple[RunningDaemon, Path]
) -> None:
    first, home = apart
    second = start_daemon("--slots", "1", "--context", "256", home=home, wait=False)
    await listening(second)
    async with httpx.AsyncClient(timeout=30, trust_env=False) as client:

        async def say(n: int) -> str:
            url = (first, second)[n % 2].url
            answer = await client.post(f"{url}/v1/feedback", json=SAID)
            assert answer.status_code == 200, answer.text
            id: str = answer.json()["id"]
            return id

        ids = await asyncio.gather(*(say(n) for n in range(60)))
        gone = await client.delete(f"{second.url}/v1/feedback/{ids[0]}")
        assert gone.status_code == 200, gone.text
        assert (await client.get(f"{first.url}/v1/feedback/{ids[0]}")).status_code == 404
    there = {record.id for record in records(home / "learning")}
    assert there >= set(ids[1:])
    assert ids[0] not in there


# kill -9


async def listening(daemon: RunningDaemon) -> None:
    """Wait until a daemon answers; its model may still load."""
    async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            assert daemon.process.poll() is None
            try:
                await client.get(f"{daemon.url}/health")
            except httpx.TransportError:
                await asyncio.sleep(0.02)
            else:
                return
    raise AssertionError("the daemon does not listen")


async def killed_while_it_writes(daemon: RunningDaemon) -> dict[str, str]:
    """Send feedback from eight clients and kill the daemon; what it acknowledged, id -> correction."""
    acknowledged: dict[str, str] = {}
    begun = asyncio.Event()

    async def client(number: int) -> None:
        for n in range(10_000):
            correction = f"{daemon.process.pid} {number} {n} " + "x" * random.randrange(3000)
            answer = await http.post("/v1/feedback", json={**SAID, "correction": correction})
            assert answer.status_code == 200, answer.text
            acknowledged[answer.json()["id"]] = correction
            begun.set()

    async with httpx.AsyncClient(base_url=daemon.url, timeout=10, trust_env=False) as http:
        clients = [asyncio.ensure_future(client(number)) for number in range(8)]
        await asyncio.wait_for(begun.wait(), 20)
        await asyncio.sleep(random.uniform(0.01, 0.3))
        daemon.process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(daemon.process.wait)
        ends = await asyncio.gather(*clients, return_exceptions=True)
    assert all(isinstance(end, httpx.TransportError) for end in ends), ends
    return acknowledged


async def kill_and_check(start_daemon: StartDaemon, home: Path, times: int) -> None:
    promised: dict[str, str] = {}
    for _ in range(times):
        daemon = start_daemon("--slots", "1", "--context", "256", home=home, wait=False)
        await listening(daemon)
        new = await killed_while_it_writes(daemon)
        promised |= new
        there = {record.id: record.correction for record in records(home / "learning")}
        lost = {id for id, correction in promised.items() if there.get(id) != correction}
        assert not lost, f"{len(lost)} of {len(promised)} acknowledged records are gone"
    assert len(promised) > times, "else this test says little"


async def test_what_was_acknowledged_survives_kill_9(start_daemon: StartDaemon, tmp_path: Path) -> None:
    await kill_and_check(start_daemon, tmp_path, KILLS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_what_was_acknowledged_survives_kill_9_a_hundred_times(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    await kill_and_check(start_daemon, tmp_path, 100)
