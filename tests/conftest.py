"""What the tests share: the real default model, and real daemons in their own processes."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from lichen.config import load
from lichen.runtime.http.daemon import Daemon, DaemonOptions
from lichen.runtime.pool import ModelPool
from lichen.runtime.served_model import ModelOptions, ServedModel
from lichen.shelf import StoreShelf

ROOT = Path(__file__).resolve().parent.parent
MODEL = "smollm2-135m"

os.environ["LICHEN_PREFIX_CACHE"] = "0"  # what a test finds computed must not depend on an earlier run


@pytest.fixture(scope="session")
def lichen_home() -> Path:
    """A home that outlives the run, so that the default model is fetched once."""
    return Path(os.environ.get("LICHEN_TEST_HOME", ROOT / ".build" / "test-home"))


@pytest.fixture(scope="session")
def model_path(lichen_home: Path) -> Path:
    """The default model as a file: LICHEN_TEST_MODEL, or pulled once into the tests' own store."""
    if given := os.environ.get("LICHEN_TEST_MODEL"):
        return Path(given)
    from lichen.sync.store import Store

    store = Store(lichen_home / "store")
    manifest = store.resolve(MODEL) or asyncio.run(store.pull(MODEL))
    return store.blob_path(manifest)


@pytest.fixture(scope="session")
def served(model_path: Path) -> Iterator[ServedModel]:
    """The default model in this process: 8 slots of 2,048 tokens."""
    options = ModelOptions(context=2048, slots=8, threads=2, queue=256)
    model = ServedModel.load(model_path, name=MODEL, sha256="", options=options)
    yield model
    model.close()


def empty_pool(home: Path = Path("/nonexistent")) -> ModelPool:
    """A pool without a model, over an empty store."""
    return ModelPool(StoreShelf(load({"home": home}, {}).config))


def daemon_over(served: ServedModel, home: Path, **options: Any) -> Daemon:
    """A daemon in this event loop over a loaded model and an empty store; nothing is closed at its end."""
    pool = empty_pool(home)
    pool.adopt(served)
    daemon = Daemon(DaemonOptions(**options), pool)
    daemon.state = "ok"
    return daemon


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class RunningDaemon:
    """A `lichen serve` process and where it answers."""

    process: subprocess.Popen[str]
    base_url: str  # ends in /v1, as OpenAI clients take it
    url: str
    model: str

    def status(self) -> dict[str, object]:
        """`GET /status`."""
        with urllib.request.urlopen(f"{self.url}/status", timeout=5) as answer:  # httpx needs 20 ms for each
            status: dict[str, object] = json.load(answer)
        return status

    def counters(self) -> dict[str, int]:
        """The engine's counters."""
        counters = self.status()["counters"]
        assert isinstance(counters, dict)
        return counters

    def wait_idle(self, seconds: float = 20) -> dict[str, int]:
        """Wait until nothing runs or waits; the counters then."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            counters = self.counters()
            if not counters["running"] and not counters["waiting"]:
                return counters
            time.sleep(0.01)
        raise AssertionError(f"still busy after {seconds} s: {counters}")


StartDaemon = Callable[..., RunningDaemon]


@pytest.fixture(scope="session")
def start_daemon(
    model_path: Path, lichen_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StartDaemon]:
    """Start `lichen serve` with flags; every daemon is ended after the tests.

    home: where it keeps what it learns from; by default one for all, with the tests' store of models.
    """
    running: list[subprocess.Popen[str]] = []
    shared = tmp_path_factory.mktemp("home")
    (shared / "store").symlink_to(lichen_home / "store")

    def start(*flags: str, wait: bool = True, home: Path = shared) -> RunningDaemon:
        port = free_port()
        command = [sys.executable, "-m", "lichen.cli", "serve", "--model", str(model_path)]
        command += ["--port", str(port), "--threads", "2", *flags]
        environment = {**os.environ, "LICHEN_HOME": str(home)}
        process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        running.append(process)
        url = f"http://127.0.0.1:{port}"
        daemon = RunningDaemon(process, f"{url}/v1", url, model_path.stem)
        if wait:
            wait_ready(daemon)
        return daemon

    yield start
    for process in running:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def wait_ready(daemon: RunningDaemon, seconds: float = 30) -> None:
    """Wait until `/health` answers 200; fail with the daemon's own words if it ends before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if daemon.process.poll() is not None:
            raise AssertionError(f"the daemon ended: {daemon.process.communicate()[0]}")
        try:
            if httpx.get(f"{daemon.url}/health", timeout=1).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.02)
    raise AssertionError(f"the daemon was not ready within {seconds} s")


@pytest.fixture(scope="session")
def daemon(start_daemon: StartDaemon) -> RunningDaemon:
    """One daemon for all tests that leave it as they found it: 8 slots of 4,096 tokens."""
    return start_daemon("--slots", "8", "--queue", "256")
