"""Models that only take up memory, on a machine that only counts it; loads last as long as a test wants."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from lichen.errors import EngineError, LichenError, NotFound, OutOfMemory
from lichen.runtime.adapters import AdapterStatus
from lichen.runtime.counters import Counters
from lichen.runtime.memory import Fitted, MemoryEstimate
from lichen.runtime.pool import ModelPool, PoolOptions
from lichen.runtime.resident import Candidate
from lichen.runtime.served_model import ModelInfo, ModelOptions, ServedModel
from lichen.runtime.speculation.plan import Speculation

LEAST = 0.5  # of a model's size, when it is shrunk as far as it goes


class FakeEngine:
    def __init__(self) -> None:
        self.state = "running"
        self.drained = False
        self.speculation = Speculation.off()

    def counters(self) -> Counters:
        return Counters(free_slots=1)

    def drain(self, timeout: float) -> bool:
        self.drained = True
        return True


class FakeAdapters:
    def status(self) -> list[AdapterStatus]:
        return []


class FakeModel:
    def __init__(self, shelf: FakeShelf, candidate: Candidate, fitted: Fitted) -> None:
        self.shelf = shelf
        self.options = fitted.options
        self.fitted = fitted
        self.engine = FakeEngine()
        self.adapters = FakeAdapters()
        self.names = frozenset({candidate.name, "default"})
        self.taken = fitted.estimate.total
        self.closed = False
        self.info = ModelInfo(
            name=candidate.name, sha256="", size=candidate.size, architecture="fake", context=8, slots=1
        )

    def close(self) -> None:
        assert not self.closed, "closed once only"
        self.closed = True
        with self.shelf.lock:
            self.shelf.used -= self.taken


class FakeShelf:
    """`sizes` are the models; "a" is the default one. `used` and `most` count memory."""

    def __init__(self, capacity: int = 100, **sizes: int) -> None:
        self.capacity, self.sizes = capacity, sizes
        self.used = self.most = 0
        self.loads: list[str] = []
        self.failures: dict[str, LichenError | Exception] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.lock = threading.Lock()
        self.given_up = 0

    def pool(self, **options: Any) -> ModelPool:
        return ModelPool(
            self,
            PoolOptions(**options),
            available=lambda: self.capacity - self.used,
            resident=lambda: self.used,
        )

    def known(self) -> list[Candidate]:
        return [Candidate(name=name, path=Path(name), size=size) for name, size in self.sizes.items()]

    def find(self, name: str) -> Candidate:
        name = "a" if name == "default" else name.lower()  # so that "A" is another name of "a"
        if name not in self.sizes:
            raise NotFound(f"The model {name!r} is not here.", param="model")
        return Candidate(name=name, path=Path(name), size=self.sizes[name])

    def fit(self, candidate: Candidate, free: int | None) -> Fitted:
        size = candidate.size
        if free is None or size <= free:
            return _fitted(size)
        if size * LEAST <= free:
            return _fitted(free, note="shrunk")
        raise OutOfMemory(candidate.name, round(size * LEAST), free)

    def load(self, candidate: Candidate, fitted: Fitted, progress: Callable[[float], bool]) -> ServedModel:
        self.loads.append(candidate.name)
        done = 0.0
        while not self.gate.is_set() or done < 1.0:
            done = min(1.0, done + 0.25)
            if not progress(done):
                self.given_up += 1
                raise EngineError("given up")
            time.sleep(0.001)
        if error := self.failures.get(candidate.name):
            raise error
        with self.lock:
            self.used += fitted.estimate.total
            self.most = max(self.most, self.used)
        return cast(ServedModel, FakeModel(self, candidate, fitted))


def _fitted(size: int, note: str = "") -> Fitted:
    return Fitted(options=ModelOptions(), estimate=MemoryEstimate(weights=size, kv=0, compute=0), note=note)
