"""What the pool keeps of one model: where it comes from, its state, and what it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from lichen.runtime.adapters import AdapterStatus
from lichen.runtime.speculation.history import DraftMinute

if TYPE_CHECKING:
    from lichen.runtime.memory import Fitted
    from lichen.runtime.served_model import ServedModel

State = Literal["loading", "ready", "unloading"]


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A model that could be loaded. size in bytes; sha256 empty for a file outside the store.

    capabilities: as `runtime.chat.capabilities` names them; none of a file that cannot be read. base and
    adapter: of a model with an adapter, the model's name and the adapter's digest.
    """

    name: str
    path: Path
    sha256: str = ""
    size: int = 0
    architecture: str = ""
    context_train: int = 0
    capabilities: tuple[str, ...] = ()
    base: str = ""
    adapter: str = ""


class Shelf(Protocol):
    """Where the pool takes models from. Every method blocks and is called off the event loop."""

    def known(self) -> list[Candidate]:
        """All models that could be loaded, the default one first."""
        ...

    def find(self, name: str) -> Candidate:
        """One of them; "default" is the configured one. Raises NotFound, and never fetches anything."""
        ...

    def fit(self, candidate: Candidate, free: int | None) -> Fitted:
        """How it would be loaded with so many bytes free (None: as configured). Raises OutOfMemory."""
        ...

    def load(self, candidate: Candidate, fitted: Fitted, progress: Callable[[float], bool]) -> ServedModel:
        """Load it; an answer of False from `progress` gives up. Raises LichenError."""
        ...


class LoadProgress:
    """How far a native load is, 0 to 1, and whether anybody still wants it; written by the loading thread."""

    def __init__(self) -> None:
        self.done = 0.0
        self.wanted = True

    def __call__(self, done: float) -> bool:
        self.done = done
        return self.wanted


@dataclass(slots=True, eq=False)
class Resident:
    """One model in the pool, from the first request for it to its end. Touched on the event loop only.

    users: how many hold it or wait for it. measured: bytes, see `Ledger`. keep_alive: seconds, None for
    the pool's own. ending: another has its name, and it only ends what it has begun.
    `loaded` is done when the state leaves "loading"; `gone` when the model is away.
    """

    candidate: Candidate
    pinned: bool
    loaded: asyncio.Future[None]
    state: State = "loading"
    model: ServedModel | None = None
    fitted: Fitted | None = None
    progress: LoadProgress = field(default_factory=LoadProgress)
    users: int = 0
    measured: int = 0
    keep_alive: float | None = None
    idle_since: float = 0.0
    expires_at: float | None = None
    timer: asyncio.TimerHandle | None = None
    task: asyncio.Task[None] | None = None
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    ending: bool = False

    @property
    def estimated(self) -> int:
        """Bytes that it was expected to take."""
        return self.fitted.estimate.total if self.fitted else 0

    @property
    def held(self) -> int:
        """Bytes that come free when it goes, whether they were touched already or not."""
        return max(self.estimated, self.measured)

    @property
    def untouched(self) -> int:
        """Bytes that it may still take although it is loaded."""
        return max(0, self.estimated - self.measured) if self.state == "ready" else 0

    def stop_timer(self) -> None:
        """Forget that it was to be unloaded."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self.expires_at = None

    def status(self, now: float) -> ModelStatus:
        """As `/status` shows it. now: the loop's clock."""
        model, candidate = self.model, self.candidate
        status = ModelStatus(
            name=candidate.name,
            sha256=candidate.sha256,
            size=candidate.size,
            architecture=candidate.architecture,
            capabilities=candidate.capabilities,
            state=self.state,
            progress=1.0 if self.state != "loading" else round(self.progress.done, 3),
            pinned=self.pinned,
            users=self.users,
            estimate=_estimate(self.fitted),
            measured_bytes=self.measured,
            note=self.fitted.note if self.fitted else "",
            idle_s=None if self.users or self.state == "loading" else round(now - self.idle_since, 1),
            expires_in_s=None if self.expires_at is None else round(max(0.0, self.expires_at - now), 1),
        )
        if model is None:
            return status
        counters, info = model.engine.counters(), model.info
        return msgspec.structs.replace(
            status,
            engine=model.engine.state,
            context=info.context,
            slots={"total": info.slots, "busy": info.slots - counters.free_slots},
            queue={"waiting": counters.waiting, "limit": model.options.queue},
            kv={"cells_used": counters.cells_used, "cells_total": info.context * info.slots},
            counters=msgspec.to_builtins(counters),
            adapters=model.adapters.status(),
            drafts=model.engine.speculation.history.recent(),
        )


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model in the pool as people and clients see it.

    estimate and measured_bytes in bytes; idle_s None while it is used; expires_in_s None where it is never
    unloaded by the clock; context, slots, queue, kv, counters, adapters and drafts (by minute, of the last
    hour) only of a model that is ready.
    """

    name: str
    sha256: str
    size: int
    architecture: str
    state: State
    progress: float
    pinned: bool
    users: int
    estimate: dict[str, int]
    measured_bytes: int
    note: str
    idle_s: float | None
    expires_in_s: float | None
    capabilities: tuple[str, ...] = ()
    engine: str = ""
    context: int = 0
    slots: dict[str, int] = {}
    queue: dict[str, int] = {}
    kv: dict[str, int] = {}
    counters: dict[str, Any] = {}
    adapters: list[AdapterStatus] = []
    drafts: list[DraftMinute] = []


def _estimate(fitted: Fitted | None) -> dict[str, int]:
    if fitted is None:
        return {}
    parts: dict[str, int] = msgspec.to_builtins(fitted.estimate)
    return {**parts, "total": fitted.estimate.total}


class Ledger:
    """Shares the growth of this process's resident set out among the models that worked meanwhile.

    Only growth over the highest value since the last load or unload counts, so that pages which come and
    go are counted once. Growth of Python itself meanwhile is counted with the models: a few MB.
    """

    def __init__(self, resident: Callable[[], int]) -> None:
        self._resident = resident
        self._high = resident()

    def settle(self, active: Collection[Resident]) -> None:
        """Give what was taken since the last call to `active`, in equal shares."""
        now = self._resident()
        grown = now - self._high
        if grown > 0:
            self._high = now
            for resident in active:
                resident.measured += grown // len(active)

    def start_over(self) -> int:
        """After memory was given back: count growth from here. Returns the resident set in bytes."""
        self._high = self._resident()
        return self._high
