"""A crowd at the door of a real daemon, which goes on serving who behaves, in little memory."""

from __future__ import annotations

import http.client
import json
import logging
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from lichen.runtime.http import open_files
from tests.conftest import RunningDaemon, StartDaemon

IDLE, HALF, SLOW, STALLED = 1000, 40, 40, 2
NEEDED = IDLE + HALF + SLOW + STALLED + 200
FEW = 256  # the soft limit under which the daemon is started
PROMPT_S = 5.0  # an answer of four tokens beside the crowd
MEMORY = 48 << 20  # bytes that the crowd may cost the daemon; 20 kB a connection were measured
FLOOD = {
    "prompt": "Count: 1, 2, 3,",
    "max_tokens": 200,
    "temperature": 0,
    "logprobs": 20,
    "stream": True,
}


@contextmanager
def soft_limit(files: int) -> Iterator[None]:
    """Another limit on the open files of this process, and of those it starts meanwhile."""
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


@pytest.fixture(scope="module")
def door(start_daemon: StartDaemon) -> RunningDaemon:
    """A daemon that was started with room for few connections."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < NEEDED:
        pytest.skip(f"the system allows only {hard} open files")
    with soft_limit(FEW):
        return start_daemon("--slots", "4", "--context", "1024", "--read-timeout", "60")


def where(daemon: RunningDaemon) -> tuple[str, int]:
    host, _, port = daemon.url.removeprefix("http://").partition(":")
    return host, int(port)


def ask(daemon: RunningDaemon) -> float:
    """Seconds until a new client has its answer."""
    started = time.monotonic()
    body = json.dumps({"prompt": "1, 2, 3,", "max_tokens": 4, "temperature": 0})
    with closing(http.client.HTTPConnection(*where(daemon), timeout=30)) as connection:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200
        assert json.load(answer)["choices"][0]["text"]
    return time.monotonic() - started


def answers(daemon: RunningDaemon) -> bool:
    """Whether a new client gets its answer, or is turned away since no file is free yet."""
    try:
        return ask(daemon) < PROMPT_S
    except OSError:
        return False


def connected(daemon: RunningDaemon, crowd: list[socket.socket], count: int, sent: bytes = b"") -> None:
    """So many more connections, each of which has sent something and reads nothing."""
    for _ in range(count):
        client = socket.socket()
        crowd.append(client)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(10)
        client.connect(where(daemon))
        client.sendall(sent)
        client.setblocking(False)


def open_now(daemon: RunningDaemon) -> int:
    """Files and sockets that the daemon has open."""
    return len(list(Path(f"/proc/{daemon.process.pid}/fd").iterdir()))


def until(true: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def test_a_crowd_costs_little_and_disturbs_nobody(door: RunningDaemon) -> None:
    assert resource.prlimit(door.process.pid, resource.RLIMIT_NOFILE)[0] >= NEEDED, "the daemon raised it"
    ask(door)
    before, files = door.status()["rss_bytes"], open_now(door)
    assert isinstance(before, int)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    flood = json.dumps(FLOOD).encode()
    crowd: list[socket.socket] = []
    with soft_limit(NEEDED):
        try:
            connected(door, crowd, IDLE)
            connected(door, crowd, HALF, head + b"Content-Length: 100\r\n\r\n{")
            for client in crowd[IDLE:]:
                client.shutdown(socket.SHUT_WR)
            connected(door, crowd, SLOW, b"GET /health HTTP/1.1\r\nX-A: ")
            slow = crowd[-SLOW:]
            connected(door, crowd, STALLED, head + b"Content-Length: %d\r\n\r\n" % len(flood) + flood)
            times = []
            for _ in range(3):
                for client in slow:
                    client.send(b"a")
                times.append(ask(door))
            grown = door.status()["rss_bytes"] - before  # type: ignore[operator]
            there = open_now(door) - files
            print(f"answers after {times}, {grown / 1e6:.1f} MB for {there} connections")
        finally:
            for client in crowd:
                client.close()
    assert there >= IDLE + SLOW, "the crowd was really there"
    assert max(times) < PROMPT_S
    assert grown < MEMORY
    until(lambda: open_now(door) <= files + 4)
    door.wait_idle()


def test_a_daemon_without_a_file_left_recovers(door: RunningDaemon) -> None:
    kept = http.client.HTTPConnection(*where(door), timeout=10)
    crowd: list[socket.socket] = []
    pid = door.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    try:
        kept.request("GET", "/health")
        assert kept.getresponse().read()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (open_now(door) + 8, limits[1]))
        for _ in range(60):  # the daemon can take eight of them
            client = socket.socket()
            crowd.append(client)
            client.setblocking(False)
            client.connect_ex(where(door))
        time.sleep(0.3)
        kept.request("GET", "/health")
        assert kept.getresponse().read() == b'{"status":"ok"}', "who was there is still answered"
        for client in crowd:
            client.close()
        until(lambda: answers(door), PROMPT_S)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        kept.close()
        for client in crowd:
            client.close()
    assert ask(door) < PROMPT_S
    assert door.process.poll() is None


@pytest.mark.parametrize(
    ("limits", "holds", "warns"),
    [
        ((1024, 1_000_000), 65_536, False),
        ((1024, resource.RLIM_INFINITY), 65_536, False),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), resource.RLIM_INFINITY, False),
        ((100_000, 1_000_000), 100_000, False),
        ((256, 512), 512, True),
        ((512, 512), 512, True),
    ],
)
def test_the_limit_goes_up_to_the_hard_one(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    limits: tuple[int, int],
    holds: int,
    warns: bool,
) -> None:
    now = [limits]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: now[0])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, wanted: now.append(wanted))
    with caplog.at_level(logging.WARNING):
        assert open_files.raise_limit() == holds
    assert now[-1] == (holds, limits[1])
    assert ("only 512 files open" in caplog.text) == warns


def test_a_refused_limit_is_said_and_no_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(kind: int, wanted: tuple[int, int]) -> None:
        raise OSError("not allowed here")

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (5000, 9000))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert open_files.raise_limit() == 5000
    assert "stays at 5000" in caplog.text
