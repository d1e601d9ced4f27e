"""A machine whose updates come out of a dictionary and whose engine says what the test wants."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

from lichen.errors import LichenError, NotFound
from lichen.sync.manifest import make_manifest
from lichen.sync.meter import Progress
from lichen.sync.pace import Pace
from lichen.sync.store import Store
from lichen.sync.updates.health import Answer, Installed, Prompt
from lichen.sync.updates.slots import Slot, Slots
from lichen.sync.updates.states import Assignment, Update
from lichen.sync.updates.supply import Offer
from lichen.sync.updates.updater import Outcome, Updater
from tests.sync.hostile_repository import manifest

SLOT = "policies/house"  # a kind without a trial and without a format of its own
MODEL = "models/house"


class Shop:
    """`Supply` over bytes by target."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.goods: dict[str, tuple[bytes, dict[str, Any]]] = {}
        self.failure: LichenError | None = None
        self.hang = False
        self.brought = 0

    def add(self, target: str, data: bytes, **more: Any) -> str:
        """Put a version on offer; its sha256."""
        self.goods[target] = (data, manifest(target, len(data), **more))
        return hashlib.sha256(data).hexdigest()

    async def find(self, target: str) -> Offer:
        """See Supply."""
        if target not in self.goods:
            raise NotFound(f"no {target}")
        data, custom = self.goods[target]
        return Offer(
            target=target,
            sha256=hashlib.sha256(data).hexdigest(),
            manifest=make_manifest(custom, running="0.1.0"),
        )

    async def bring(self, offer: Offer, *, progress: Progress | None, pace: Pace | None) -> None:
        """See Supply."""
        if self.hang:
            await asyncio.Event().wait()
        if self.failure is not None:
            raise self.failure
        if not self.store.blob(offer.sha256).is_file():
            self.brought += 1
            staged = self.store.root / "partial" / "it"
            staged.parent.mkdir(parents=True, exist_ok=True)
            staged.write_bytes(self.goods[offer.target][0])
            self.store.place(staged, offer.sha256)


class Oracle:
    """`Trial` that knows its answers: text by sha256, and "fine" for all others."""

    def __init__(self) -> None:
        self.says: dict[str, str] = {}
        self.rates: dict[str, float] = {}
        self.failure: dict[str, LichenError] = {}
        self.hangs: set[str] = set()
        self.tried: list[str] = []

    async def answers(self, version: Installed, prompts: tuple[Prompt, ...]) -> list[Answer]:
        """See Trial."""
        self.tried.append(version.sha256)
        if version.sha256 in self.hangs:
            await asyncio.Event().wait()
        if version.sha256 in self.failure:
            raise self.failure[version.sha256]
        rate = self.rates.get(version.sha256, 50.0)
        return [
            Answer(text=self.says.get(version.sha256, "fine"), tokens=10, seconds=10 / rate) for _ in prompts
        ]

    async def perplexity(self, version: Installed, text: str) -> float:
        """See Trial."""
        return 12.0


class Machine:
    """A store, an updater over a shop, and a clock that the test sets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "store")
        self.shop, self.oracle = Shop(self.store), Oracle()
        self.now = 1_800_000_000.0
        self.waits = ""
        self.seen: list[tuple[str, str]] = []
        self.updater = self.started()

    def started(self) -> Updater:
        """An updater as after a start of the process."""

        def watch(update: Update) -> None:
            self.seen.append((update.slot, update.state))

        return Updater(
            self.folder / "fleet",
            self.store,
            self.shop,
            self.oracle,
            clock=lambda: self.now,
            permit=lambda _update: self.waits,
            on_change=watch,
        )

    def restart(self) -> None:
        """The process dies and another one begins."""
        self.updater.close()
        self.updater = self.started()

    async def pull(self, slot: str = SLOT, target: str = "", **more: Any) -> Outcome:
        """One pull of one slot."""
        (outcome,) = await self.updater.pull([Assignment(slot=slot, target=target or slot, **more)])
        return outcome

    def slot(self, name: str = SLOT) -> Slot:
        """What is in use."""
        return Slots(self.store.root).load().get(name, Slot())

    def serves(self, name: str = SLOT) -> bytes:
        """The bytes that a request would get now."""
        return self.store.blob(Slots(self.store.root).serving(name).sha256).read_bytes()
