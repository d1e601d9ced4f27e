"""The adapters that an engine has in memory: loaded, applied, and freed once nothing that runs uses them.

Owned by the engine thread. llama.cpp applies adapters to a whole context, so a step belongs to one adaptation
(`scheduler.py`); a change makes the next step some milliseconds longer, since llama.cpp plans its graph anew.
`adapters.py` is the other half, on the callers' side, which decides what is loaded.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Protocol

from lichen.errors import EngineError
from lichen.runtime.adaptation import PLAIN, Adaptation
from lichen.runtime.native import Adapter, Model


class Adaptable(Protocol):
    """A native context: takes one adapter or none."""

    def adapt(self, adapter: Adapter | None, scale: float) -> None:
        """Apply it to all that is computed from here on. Raises EngineError."""
        ...


class AdapterBank:
    """See the module. context: the engine's own."""

    def __init__(self, model: Model, context: Adaptable) -> None:
        self.switches = 0
        self._model = model
        self._context = context
        self._there: dict[str, Adapter] = {}
        self._applied: dict[Adaptable, Adaptation] = {context: PLAIN}
        self._users: Counter[str] = Counter()  # live sequences by digest
        self._retired: set[str] = set()

    def load(self, digest: str, path: Path) -> None:
        """Bring a checked file into memory; once. Raises AdapterError when llama.cpp refuses it."""
        self._retired.discard(digest)
        if digest not in self._there:
            self._there[digest] = Adapter(self._model, path)

    def begin(self, adaptation: Adaptation) -> None:
        """A sequence came that will be computed with it; the adapter stays until `end`."""
        self._users[adaptation.digest] += 1

    def end(self, adaptation: Adaptation) -> None:
        """One sequence less uses it."""
        self._users[adaptation.digest] -= 1
        if adaptation.digest in self._retired and not self._users[adaptation.digest]:
            self._free(adaptation.digest)

    def apply(self, adaptation: Adaptation, context: Adaptable | None = None) -> bool:
        """Have a context (None: the engine's) compute with it from here on; whether that was a change.

        Raises EngineError, and for an adapter that is not in memory too.
        """
        context = context or self._context
        if self._applied.get(context, PLAIN) == adaptation:
            return False
        adapter = self._there.get(adaptation.digest)
        if adaptation and adapter is None:
            raise EngineError("The adapter of this request is not in memory.", hint="Try again.")
        context.adapt(adapter, adaptation.scale)
        self._applied[context] = adaptation
        self.switches += context is self._context
        return True

    def retire(self, digest: str) -> None:
        """Free an adapter, at once or when the last sequence that uses it has ended."""
        if digest not in self._there:
            return
        if self._users[digest]:
            self._retired.add(digest)
        else:
            self._free(digest)

    def forget(self, context: Adaptable) -> None:
        """A context is about to be closed."""
        self._applied.pop(context, None)

    def close(self) -> None:
        """Free all of them; nothing computes any more."""
        for digest in list(self._there):
            self._free(digest)

    def _free(self, digest: str) -> None:
        for context, applied in self._applied.items():
            if applied.digest == digest:  # it must not point at memory that is gone
                self.apply(PLAIN, context)
        self._retired.discard(digest)
        self._there.pop(digest).close()
