"""The signals that ask a daemon to stop: SIGTERM and a first SIGINT let it finish, a second does not."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable


class Stops:
    """The signals that ask a daemon to stop, counted."""

    def __init__(self) -> None:
        self._first = asyncio.Event()
        self._second = asyncio.Event()

    def ask(self, *, again_is_now: bool) -> None:
        if again_is_now and self._first.is_set():
            self._second.set()
        self._first.set()

    async def wait_first(self) -> None:
        await self._first.wait()

    async def wait_second(self) -> None:
        await self._second.wait()


def signals(on_event: Callable[[str], None]) -> Stops:
    stops = Stops()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        stops.ask(again_is_now=True)
        on_event("Finishing the running answers; press Ctrl-C again to stop now.")

    loop.add_signal_handler(signal.SIGTERM, lambda: stops.ask(again_is_now=False))
    loop.add_signal_handler(signal.SIGINT, interrupt)
    return stops
