"""How long the reader of a mailbox waits."""

from __future__ import annotations

import asyncio
import time

from lichen.runtime.generation import Mailbox
from lichen.runtime.sequence import Prefill


async def test_a_reader_waits_as_long_as_it_says() -> None:
    mailbox = Mailbox()
    started = time.monotonic()
    assert await mailbox.get(0.2) is None
    assert await mailbox.get(0.05) is None, "a shorter wait after a longer one"
    assert 0.24 < time.monotonic() - started < 5


async def test_each_event_begins_a_new_wait() -> None:
    mailbox = Mailbox()
    loop, started = asyncio.get_running_loop(), time.monotonic()
    for number in range(4):
        loop.call_later(0.1, mailbox.put, [Prefill(number, 4)])
        assert await mailbox.get(0.3) == Prefill(number, 4)
    assert await mailbox.get(0.3) is None
    assert time.monotonic() - started > 0.65


async def test_a_reader_without_limit_is_not_woken_by_an_old_alarm() -> None:
    mailbox = Mailbox()
    mailbox.put([Prefill(1, 2)])
    assert await mailbox.get(0.05) == Prefill(1, 2)
    asyncio.get_running_loop().call_later(0.02, mailbox.put, [Prefill(2, 2)])
    assert await mailbox.get(0.05) == Prefill(2, 2)
    asyncio.get_running_loop().call_later(0.2, mailbox.put, [Prefill(3, 2)])
    assert await mailbox.get() == Prefill(3, 2)
