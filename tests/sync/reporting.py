"""A collector and devices in memory, for tests of what they say to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from lichen.errors import LichenError, SourceError
from lichen.sync.collector.database import Database
from lichen.sync.collector.desk import Desk
from lichen.sync.reporting.key import DeviceKey
from lichen.sync.reporting.outbox import Outbox
from lichen.sync.reporting.reporter import Reporter
from lichen.sync.reporting.wire import Batch, UpdateReport, signature_text
from lichen.sync.trust.enrolment import Enrolment

FLEET, TOKEN = "moss", "t" * 32
SLOT, TARGET, SHA = "adapters/support", "adapters/support-2", "2" * 64


class World:
    """A clock, a desk, and a network that can be cut or lose answers. spoken: path, body, signature."""

    def __init__(self, path: Path | str = ":memory:", **options: Any) -> None:
        self.now = 1_800_000_000.0
        self.database = Database(path, max_devices=options.pop("max_devices", 1000), retention=90 * 86_400.0)
        self.desk = Desk(self.database, fleet=FLEET, token=TOKEN, clock=lambda: self.now, **options)
        self.cut, self.loses_answers = False, False
        self.spoken: list[tuple[str, bytes, str]] = []

    async def post(self, path: str, body: bytes, signature: str) -> tuple[int, bytes]:
        """See lichen.sync.reporting.reporter.Post."""
        if self.cut:
            raise SourceError("The collector cannot be reached.")
        self.spoken.append((path, body, signature))
        try:
            act = self.desk.join if path == "/v1/devices" else self.desk.take
            answer = msgspec.json.encode(act(body, signature, "10.0.0.1"))
        except LichenError as error:
            return error.status, str(error).encode()
        if self.loses_answers:
            raise SourceError("The collector broke off.")
        return 200, answer

    def reporter(
        self, key: DeviceKey | None = None, outbox: Outbox | None = None, *, behind: float = 0, **bundle: Any
    ) -> Reporter:
        """A device. behind: seconds that its clock is behind."""

        def clock() -> float:
            return self.now - behind

        return Reporter(
            key or DeviceKey.generate(),
            outbox or Outbox(":memory:", clock=clock),
            enrolment(**bundle),
            hardware="small",
            clock=clock,
        )

    def sequences(self) -> list[int]:
        """Numbers of the outcomes that the collector has."""
        return [each.sequence for each in self.database.reported(SLOT)]


def enrolment(**fields: Any) -> Enrolment:
    """A bundle that names a collector; its root is not looked at here."""
    given: dict[str, Any] = {
        "collector": "https://c.example/",
        "token": TOKEN,
        "tags": {"site": "oslo"},
    } | fields
    return Enrolment(fleet=FLEET, root=b"{}", mirrors=("https://m.example/",), **given)


def report(**fields: Any) -> UpdateReport:
    """A confirmed version 2."""
    given: dict[str, Any] = {
        "sequence": 1,
        "at": 1_800_000_000.0,
        "target": TARGET,
        "sha256": SHA,
        "state": "confirmed",
    }
    return UpdateReport(slot=SLOT, **(given | fields))


def batch(key: DeviceKey, *reports: UpdateReport, **fields: Any) -> tuple[bytes, str]:
    """A signed batch: its body, and the signature's header."""
    given: dict[str, Any] = {
        "fleet": FLEET,
        "device": key.id,
        "sent": 1_800_000_000.0,
        "reports": reports,
    } | fields
    body = msgspec.json.encode(Batch(**given))
    return body, signature_text(key.sign("report", body))
