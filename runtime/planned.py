"""The plan of the default model as others see it, and what of a plan can change while a model runs."""

from __future__ import annotations

import msgspec

from lichen.runtime.scheduler import Budget
from lichen.runtime.served_model import ServedModel


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan does. ttft: seconds to the first token. rate: tokens a second of all users. memory: bytes
    of the process."""

    ttft: float | None
    rate: float
    memory: int


class PlanStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The plan that is followed: what it is for, what it sets, what it promised and what came.

    seen: of the last window in which requests ran. slowdown: how many times slower than predicted. making:
    the layout that is being made, with how far it is. reason: of the last of so many `changes`.
    """

    intent: str
    layout: str
    slots: int
    threads: int
    chunk: int
    predicted: Figures
    seen: Figures | None = None
    slowdown: float = 1.0
    making: str = ""
    changes: int = 0
    reason: str = ""


def retune(served: ServedModel, *, threads: int, chunk: int) -> None:
    """From the next step on, compute with other threads and another `chunk` (see `ModelOptions`).

    Raises Unavailable once the engine is gone.
    """
    engine = served.engine

    def change() -> None:
        engine.context.set_threads(threads)
        engine.scheduler.budget = Budget.of(engine.context.batch, chunk)

    engine.call(change)
    served.options = msgspec.structs.replace(served.options, threads=threads, chunk=chunk)
