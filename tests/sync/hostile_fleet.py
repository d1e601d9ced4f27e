"""A device of a fleet whose repository can be made to lie, for tests of what the device then does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lichen.errors import LichenError
from lichen.sync.trust.device import Device
from lichen.sync.trust.enrolment import Enrolment, write_enrolment
from lichen.sync.trust.verification import Standing
from tests.sync.hostile_repository import NOW, HostileRepository, MemoryMirror

LICHEN = "0.1.0"
PATH = "models/small"


class Fleet:
    """A repository with one model, and a device that has seen it."""

    def __init__(self, folder: Path) -> None:
        self.repository = HostileRepository()
        self.repository.add(PATH, b"weights")
        self.repository.release()
        self.now = NOW
        self.device = Device(folder / "fleet", clock=lambda: self.now)
        bundle = Enrolment(fleet="moss", root=self.repository.first_root, mirrors=("https://m.example/",))
        self.device.enrol(write_enrolment(bundle))
        self.refresh()

    def refresh(self, *mirrors: MemoryMirror) -> Standing:
        return asyncio.run(self.device.refresh(list(mirrors) or [self.repository.mirror()]))

    def fetch(self, folder: Path, *mirrors: MemoryMirror) -> bytes:
        async def both() -> None:
            chosen = list(mirrors) or [self.repository.mirror()]
            target = await self.device.target(PATH, running=LICHEN, mirrors=chosen)
            await self.device.download(target, folder / "got", chosen)

        asyncio.run(both())
        return (folder / "got").read_bytes()

    def versions(self) -> dict[str, int]:
        return dict(self.device.state().standing.versions)

    def refuses(self, error: type[LichenError], match: str, *mirrors: MemoryMirror) -> None:
        """The refresh fails so, and what was trusted stays."""
        before = self.versions()
        with pytest.raises(error, match=match):
            self.refresh(*mirrors)
        assert self.versions() == before
