"""Three device processes, a bad link, a collector: wave 1, gate, wave 2, a bad version, rollback."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from lichen.durable import write_file
from lichen.sync.collector.reading import empty, read_census, step
from lichen.sync.manifest import make_manifest
from lichen.sync.rollout import Gates, Policy, Wave
from lichen.sync.store import Store
from lichen.sync.trust.device import utc_now
from lichen.sync.trust.enrolment import Enrolment, write_enrolment
from lichen.sync.trust.publisher import Publisher
from lichen.sync.trust.rollouts import Rollouts
from lichen.sync.trust.signers import Signers
from tests.cli.test_rollouts import collecting
from tests.conftest import ROOT
from tests.sync.faulty_server import FaultyServer
from tests.sync.hostile_repository import manifest
from tests.sync.weights import gguf_of, nudged, weights

SLOT = "models/house"
SCRIPT = Path(__file__).with_name("member_process.py")
PATIENCE_S = 180.0


@contextmanager
def device(folder: Path, bundle: Path, bad: str) -> Iterator[None]:
    """A device process, until the end of the block."""
    log = folder.with_suffix(".log").open("wb")
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), str(bundle), bad],
        stdout=log,
        stderr=log,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        yield
        assert process.poll() is None, folder.with_suffix(".log").read_text(encoding="utf-8")[-2000:]
    finally:
        process.kill()
        process.wait()
        log.close()


class Studio:
    """The publisher, and what it sees."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.repository = folder, folder / "repository"
        signers = Signers(folder / "keys", lambda: "correct horse")
        self.publisher = Publisher(self.repository, signers, clock=utc_now)
        self.root = self.publisher.init(root_keys=1, threshold=1)
        self.rollouts = Rollouts(self.publisher, self.repository, folder / "lock", clock=utc_now)
        self.url, self.token = "", ""

    def publish(self, version: str, data: bytes, **more: object) -> str:
        file = self.folder / "weights"
        file.write_bytes(data)
        fields = manifest(f"{SLOT}-{version}", len(data), **more)
        return self.publisher.publish(file, make_manifest(fields, running="0.1.0")).hashes["sha256"]

    def bundle(self, mirror: str, collector: str | None, ring: str) -> Path:
        path = self.folder / f"{ring}.json"
        bundle = Enrolment(
            fleet="moss",
            root=self.root,
            mirrors=(mirror,),
            tags={"ring": ring},
            collector=collector,
            token="t" * 32,
        )
        write_file(path, write_enrolment(bundle))
        return path

    async def watch(self) -> Policy:
        """One look at the collector and what follows from it, as `lichen fleet watch` does."""
        async with httpx.AsyncClient() as client:
            census = await read_census(client, self.url, self.token, SLOT)
        now = datetime.datetime.now(datetime.UTC)
        return step(self.rollouts, "house", census or empty(SLOT, now), now, person=False)[0]

    async def until(self, homes: list[Path], sha256: str, state: str, opened: int) -> None:
        """Watch until the rollout is there and all devices use and have confirmed this version."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            policy = await self.watch()
            slots = [Store(home / "store").slots.mendable().get(SLOT) for home in homes]
            active = [slot.active.sha256 if slot and slot.active and slot.confirmed else "" for slot in slots]
            if (policy.state, policy.opened) == (state, opened) and active == [sha256] * len(homes):
                return
            time.sleep(0.3)
        raise AssertionError(f"{policy.state}, {policy.opened} waves open, {active}, {policy.reason}")


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_three_devices_behind_a_bad_link(tmp_path: Path) -> None:
    studio, first = Studio(tmp_path), weights(layers=2)
    changed = [first | {"blk.1.ffn_up.weight": nudged(first["blk.1.ffn_up.weight"], s)} for s in (0.01, 0.02)]
    one, two, three = (studio.publish(str(n), gguf_of(w)) for n, w in enumerate([first, *changed], 1))
    server = FaultyServer(studio.repository, chance=0.1)
    quick = Gates(min_reports=1, soak_s=0, max_rollbacks=0.0, min_speed=None)
    waves = (Wave(tags={"ring": "early"}, gates=quick, hold=False), Wave(gates=quick, hold=False))
    homes = [tmp_path / f"device-{number}" for number in range(3)]
    studio.rollouts.start("models", "house", "1", (Wave(gates=quick),))
    with ExitStack() as running:
        draft = studio.bundle(server.url, "http://127.0.0.1:1/", "early")
        studio.url = running.enter_context(collecting(tmp_path / "collector", draft))
        studio.token = (tmp_path / "collector" / "reader.token").read_text(encoding="ascii").strip()
        for home, ring in zip(homes, ("early", "late", "late"), strict=True):
            bundle = studio.bundle(server.url, studio.url, ring)
            running.enter_context(device(home, bundle, three))
        await studio.until(homes, one, "running", 1)
        studio.rollouts.start("models", "house", "2", waves)
        await studio.until(homes, two, "running", 2)
        studio.rollouts.start("models", "house", "3", waves)
        await studio.until(homes, two, "rolled_back", 1)
        early, *late = (Store(home / "store").slots.mendable()[SLOT] for home in homes)
        assert three in early.bad
        assert not any(three in slot.bad for slot in late), "the bad version came to wave 1 alone"
        assert all(not (Store(home / "store").blob(three)).exists() for home in homes[1:])
    server.close()
    assert all(server.faults.values()), server.faults
