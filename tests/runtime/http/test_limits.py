"""Limits by themselves: buckets against a clock in memory, and connections that stand still."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from lichen.errors import RateLimited
from lichen.runtime.http.limits import MAX_BUCKETS, RateLimiter, cut_stalled


def test_a_client_gets_its_rate_and_no_more() -> None:
    now = [0.0]
    rate = RateLimiter(6, clock=lambda: now[0])
    for _ in range(6):
        rate.take("ann")
    with pytest.raises(RateLimited) as caught:
        rate.take("ann")
    assert caught.value.retry_after == 10
    rate.take("bob")
    now[0] = 9.9
    with pytest.raises(RateLimited):
        rate.take("ann")
    now[0] = 10.1
    rate.take("ann")
    now[0] = 1e6
    for _ in range(6):
        rate.take("ann")
    with pytest.raises(RateLimited):
        rate.take("ann")
    for number in range(2 * MAX_BUCKETS):
        rate.take(str(number))
    assert len(rate._buckets) == MAX_BUCKETS, "many addresses do not fill the memory"


def test_no_rate_is_no_limit_and_remembers_nobody() -> None:
    rate, limited = RateLimiter(0, clock=lambda: 0.0), RateLimiter(1, clock=lambda: 0.0)
    for number in range(1000):
        rate.take("ann")
        rate.take(str(number))
    assert not rate._buckets
    limited.take("ann")
    with pytest.raises(RateLimited):  # so that one more is no limit either
        limited.take("ann")


class Connection:
    """What `cut_stalled` sees of one: `unsent` gives the bytes in its buffer at each look."""

    def __init__(
        self, *unsent: int, paused: bool = False, closing: bool = False, forgets: bool = False
    ) -> None:
        self.writing_paused = paused
        self.aborted = False
        self._unsent = list(unsent)
        self._closing = closing
        self._forgets = forgets
        self._looks = 0

    @property
    def transport(self) -> Connection | None:
        self._looks += 1
        return None if self._forgets and self._looks > 2 else self

    def get_write_buffer_size(self) -> int:
        return self._unsent.pop(0) if len(self._unsent) > 1 else self._unsent[0]

    def is_closing(self) -> bool:
        return self._closing

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize(
    ("connection", "aborted"),
    [
        (Connection(70_000, paused=True), True),
        (Connection(*range(70_000, 60_000, -1), paused=True), False),  # slow, but it reads
        (Connection(70_000, 70_000, 65_000, paused=True), True),
        (Connection(70_000, 0, 70_000, 0, 70_000, 0, paused=True), False),
        (Connection(100), False),  # on its way to a client that reads
        (Connection(100, closing=True), True),
        (Connection(*range(9_000, 1, -1), closing=True), True),  # it had its time
        (Connection(100, closing=True, forgets=True), True),
        (Connection(0, closing=True), False),
    ],
)
async def test_only_connections_that_stand_still_are_cut(connection: Connection, aborted: bool) -> None:
    server: Any = SimpleNamespace(connections=[connection])
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(cut_stalled(server, 0.08), 0.4)
    assert connection.aborted is aborted
