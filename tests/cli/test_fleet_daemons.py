"""Three daemons with the real model behind a bad link, in a rollout of waves that ends with a bad version."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from lichen.sync.rollout import Gates, Wave
from lichen.sync.store import Store
from tests.cli.test_commands import lichen
from tests.cli.test_fleet_daemon import HEALTH, answer, renamed, spoiled
from tests.cli.test_rollouts import collecting
from tests.conftest import StartDaemon
from tests.sync.faulty_server import FaultyServer
from tests.sync.test_rollout_processes import SLOT, Studio

QUICK = Gates(min_reports=1, soak_s=0, max_rollbacks=0.0, min_speed=None)
WAVES = (Wave(tags={"ring": "early"}, gates=QUICK, hold=False), Wave(gates=QUICK, hold=False))


def joins(home: Path, bundle: Path) -> None:
    """A new machine: enrolled, and pulled to the fleet's version over the bad link, which may break off."""
    done = lichen("fleet", "enrol", str(bundle), home=home)
    assert done.returncode == 0, done.stderr
    for _ in range(10):
        done = lichen("fleet", "pull", home=home, LICHEN_THREADS="1", LICHEN_FLEET_BATTERY="true")
        if done.returncode == 0 and Store(home / "store").slots.mendable():
            return
    raise AssertionError(done.stdout + done.stderr)


class Users:
    """Somebody at each daemon who asks all the time; `answered` has the models that answered, by daemon."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.answered: dict[str, list[str]] = {url: [] for url in urls}

    async def ask(self, url: str) -> None:
        """For ever. Raises AssertionError when an answer fails, httpx.ReadTimeout when none comes."""
        async with httpx.AsyncClient(timeout=120) as client:
            while True:
                self.answered[url].append(await answer(client, url, "fleet:house"))

    async def during(self, studio: Studio, homes: list[Path], sha256: str, state: str, opened: int) -> None:
        """Ask until the rollout is there, and every daemon answers with this version."""
        asking = [asyncio.ensure_future(self.ask(url)) for url in self.answered]
        try:
            await studio.until(homes, sha256, state, opened)
            while any(names[-1:] != [f"house-{sha256[:8]}"] for names in self.answered.values()):
                await asyncio.wait(asking, timeout=0.5)
                assert not any(task.done() for task in asking)
        finally:
            broken = [task for task in asking if task.done()]
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        for task in broken:
            task.result()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_fleet_of_daemons_takes_a_good_version_and_gives_a_bad_one_back(
    tmp_path: Path, model_path: Path, start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio, file = Studio(tmp_path), tmp_path / "other.gguf"
    homes = [tmp_path / f"device-{number}" for number in range(3)]
    monkeypatch.setenv("LICHEN_FLEET_EVERY", "2")
    monkeypatch.setenv("LICHEN_FLEET_BATTERY", "true")
    one = studio.publish("1", model_path.read_bytes(), health=HEALTH)
    studio.rollouts.start("models", "house", "1", (Wave(gates=QUICK),))
    server = FaultyServer(studio.repository, chance=0.05, slow=500_000)
    with ExitStack() as running:
        draft = studio.bundle(server.url, "http://127.0.0.1:1/", "early")
        studio.url = running.enter_context(collecting(tmp_path / "collector", draft))
        studio.token = (tmp_path / "collector" / "reader.token").read_text(encoding="ascii").strip()
        bundles = [studio.bundle(server.url, studio.url, ring) for ring in ("early", "late")]
        with ThreadPoolExecutor() as pool:
            list(pool.map(joins, homes, (bundles[0], bundles[1], bundles[1])))
        small = ("--slots", "1", "--context", "1024", "--threads", "1")
        daemons = [start_daemon("--model", "fleet:house", *small, home=home) for home in homes]
        users = Users([daemon.url for daemon in daemons])

        renamed(model_path, file)
        two = studio.publish("2", file.read_bytes(), health=HEALTH)
        studio.rollouts.start("models", "house", "2", WAVES)
        asyncio.run(users.during(studio, homes, two, "running", 2))

        spoiled(model_path, file)
        three = studio.publish("3", file.read_bytes(), health=HEALTH)
        studio.rollouts.start("models", "house", "3", WAVES)
        asyncio.run(users.during(studio, homes, two, "rolled_back", 1))
    server.close()
    early, *late = (Store(home / "store").slots.mendable()[SLOT] for home in homes)
    assert early.bad == (three,)
    assert not any(slot.bad for slot in late), "the bad version came to wave 1 alone"
    for names in users.answered.values():
        assert set(names) == {f"house-{one[:8]}", f"house-{two[:8]}"}, "never the bad one"
    assert all(server.faults.values()), server.faults
