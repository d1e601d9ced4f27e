"""The collector's rules, without a network: who may join, whose reports count, what a request may cost.

A device joins with the token of the enrolment bundle and proves that it holds its key. With `approve` it then
waits until a person lets it in: its reports are kept, and count for nothing until then.
"""

from __future__ import annotations

import hmac
import math
from collections import OrderedDict
from collections.abc import Callable

from lichen.errors import FleetError, Forbidden, PayloadTooLarge, RateLimited, RequestError, Unauthorized
from lichen.sync.collector.database import Database, Membership
from lichen.sync.reporting.key import verify
from lichen.sync.reporting.wire import (
    BODY_LIMIT,
    Acknowledged,
    Batch,
    Document,
    Joining,
    device_id,
    read_document,
    read_signature,
)

OLD_AFTER = 3600.0  # seconds between two looks for what is too old


class Allowance:
    """So many calls an hour for each caller, and as many at once. Remembers the newest callers only."""

    def __init__(self, an_hour: int, *, callers: int = 65_536) -> None:
        self._an_hour, self._callers = an_hour, callers
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def spend(self, caller: str, now: float) -> None:
        """Count a call. Raises RateLimited."""
        left, then = self._left.pop(caller, (float(self._an_hour), now))
        left = min(float(self._an_hour), left + max(0.0, now - then) * self._an_hour / 3600)
        self._left[caller] = (left - 1 if left >= 1 else left, now)
        if len(self._left) > self._callers:
            self._left.popitem(last=False)
        if left < 1:
            wait = math.ceil((1 - left) * 3600 / self._an_hour)
            raise RateLimited("This device or address comes too often.", retry_after=wait)


class Desk:
    """Takes joinings and reports of one fleet. clock: seconds since 1970. token: of the bundle.

    device_rate, address_rate: requests an hour.
    """

    def __init__(
        self,
        database: Database,
        *,
        fleet: str,
        token: str,
        clock: Callable[[], float],
        approve: bool = False,
        device_rate: int = 240,
        address_rate: int = 36_000,
    ) -> None:
        self.database, self.fleet = database, fleet
        self._token, self._clock, self._approve = token, clock, approve
        self._by_device, self._by_address = Allowance(device_rate), Allowance(address_rate)
        self._cleaned = -math.inf

    def join(self, body: bytes, signature: str, address: str = "") -> Membership:
        """Let a device join. Raises RequestError, Unauthorized, RateLimited and the like."""
        now = self._clock()
        self._by_address.spend(address, now)
        joining = self._read(body, Joining)
        if not hmac.compare_digest(joining.token.encode(), self._token.encode()):
            raise Forbidden("The token is not this fleet's.", hint="Enrol with the fleet's present bundle.")
        self._own(joining.fleet)
        if not verify(joining.key, "join", body, self._signature(signature)):
            raise Unauthorized("The joining is not signed by the key that it names.")
        self._by_device.spend(device_id(joining.key), now)
        return self.database.join(joining.key, now, "waiting" if self._approve else "member")

    def take(self, body: bytes, signature: str, address: str = "") -> Acknowledged:
        """Take a batch of reports; a replay changes nothing. Raises as `join` does."""
        now = self._clock()
        self._by_address.spend(address, now)
        batch = self._read(body, Batch)
        self._own(batch.fleet)
        if not verify(self.database.key(batch.device), "report", body, self._signature(signature)):
            raise Forbidden("The reports are not signed by the device that they name.")
        self._by_device.spend(batch.device, now)
        if now - self._cleaned > OLD_AFTER:
            self._cleaned = now
            self.database.forget_old(now)
        sequence, new = self.database.take(batch, now)
        return Acknowledged(sequence=sequence, new=new)

    def _read(self, body: bytes, kind: type[Document]) -> Document:
        if len(body) > BODY_LIMIT:
            raise PayloadTooLarge(f"A body may have {BODY_LIMIT:,} bytes.")
        try:
            return read_document(body, kind)
        except FleetError as error:
            raise RequestError(error.message) from error

    def _own(self, fleet: str) -> None:
        if fleet != self.fleet:
            raise Forbidden(f"This collector is the fleet {self.fleet}'s.")

    def _signature(self, text: str) -> bytes:
        try:
            return read_signature(text)
        except FleetError as error:
            raise RequestError(error.message) from error
