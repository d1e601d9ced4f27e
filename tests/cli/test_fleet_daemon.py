"""A daemon of a fleet, with the real model: it moves to a version while it answers, and not to a bad one."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from lichen.quant.gguf_check import tensor_places
from tests.cli.test_commands import lichen
from tests.conftest import RunningDaemon, StartDaemon

HEALTH = {
    "prompts": [{"text": "Why is the sky blue?", "expects": ["sky"], "max_tokens": 24}],
    "seconds": 120,
}


def spoiled(path: Path, target: Path) -> None:
    """The model with a few tensors of noise: it loads, and speaks no language."""
    data = bytearray(path.read_bytes())
    chance = random.Random(0)
    for place in tensor_places(path)[1:40:4]:
        data[place.offset : place.offset + place.size] = chance.randbytes(place.size)
    target.write_bytes(data)


def renamed(path: Path, target: Path) -> None:
    """The same weights under another hash: one letter of the name in the header, which no prompt holds."""
    data = path.read_bytes()
    at = data.index(b"Smollm2 135M")
    target.write_bytes(data[:at] + b"s" + data[at + 1 :])


async def asking(url: str, act: Callable[[], None], until: Callable[[], bool]) -> set[str]:
    """Ask `fleet:support` all the time while something is done and until it shows; the models that answered.

    Meanwhile the event loop must answer at once, whatever is loaded and tried.
    """
    answered: set[str] = set()
    async with httpx.AsyncClient(timeout=60) as client:
        pulse = asyncio.ensure_future(beating(url))
        acting = asyncio.ensure_future(asyncio.to_thread(act))
        try:
            while not (acting.done() and await asyncio.to_thread(until)):
                answered.add(await answer(client, url))
            await acting
            answered.add(await answer(client, url))
        finally:
            pulse.cancel()
            with suppress(asyncio.CancelledError):
                await pulse
    return answered


async def answer(client: httpx.AsyncClient, url: str, model: str = "fleet:support") -> str:
    """Which model answers now, and sensibly."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        "max_tokens": 16,
        "temperature": 0,
    }
    got = await client.post(f"{url}/v1/chat/completions", json=body)
    assert got.status_code == 200, got.text
    assert "sky" in got.json()["choices"][0]["message"]["content"]
    name: str = got.json()["model"]
    return name


async def beating(url: str) -> None:
    """Ask how the daemon is, for ever. Raises httpx.ReadTimeout when it does not say so soon."""
    async with httpx.AsyncClient(timeout=5) as client:
        while True:
            assert (await client.get(f"{url}/health")).status_code == 200
            await asyncio.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_request_is_dropped_while_versions_come_and_go(
    tmp_path: Path, model_path: Path, start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, repository = tmp_path / "home", tmp_path / "fleet"
    (tmp_path / "health.json").write_text(json.dumps(HEALTH))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        done = lichen("fleet", *words, home=home, LICHEN_FLEET_PASSPHRASE="correct horse")
        assert done.returncode == 0, done.stderr
        return done

    def publish(file: Path) -> None:
        words = ("--kind", "models", "--name", "support", "--licence", "Apache-2.0")
        run("publish", str(repository), str(file), *words, "--health", str(tmp_path / "health.json"))

    def stands() -> tuple[str, str]:
        (row,) = json.loads(run("state", "--json").stdout)["updates"]
        return row["state"], row["reason"]

    def within(reached: Callable[[], bool]) -> Callable[[], bool]:
        """Look every second, for four minutes."""
        deadline, last = time.monotonic() + 240, [0.0]

        def look() -> bool:
            assert time.monotonic() < deadline, stands()
            if time.monotonic() - last[0] < 1:
                return False
            last[0] = time.monotonic()
            return reached()

        return look

    run("init", str(repository), "--mirror", repository.as_uri(), "--name", "moss")
    publish(model_path)
    run("enrol", str(repository / "enrolment.json"))
    run("pull", "models/support")
    monkeypatch.setenv("LICHEN_FLEET_EVERY", "2")
    monkeypatch.setenv("LICHEN_FLEET_BATTERY", "true")
    daemon: RunningDaemon = start_daemon("--model", "fleet:support", home=home)

    second, bad = tmp_path / "second.gguf", tmp_path / "bad.gguf"
    renamed(model_path, second)
    spoiled(model_path, bad)
    first = loaded(daemon)

    def moved() -> bool:
        assert stands()[0] != "rolled back", stands()
        return not first & loaded(daemon)

    answered = asyncio.run(asking(daemon.url, lambda: publish(second), within(moved)))
    assert len(answered) == 2, "the first version, then the second"
    more = asyncio.run(asking(daemon.url, lambda: publish(bad), within(lambda: stands()[0] == "rolled back")))
    assert "answered 0 of 1" in stands()[1]
    assert more == answered - first, "the second version, and never the bad one"


def loaded(daemon: RunningDaemon) -> set[str]:
    """Names of the models that are in the daemon."""
    models = daemon.status()["models"]
    assert isinstance(models, list)
    return {model["name"] for model in models}
