"""Models by name, and models with an adapter, which are named MODEL:ADAPTER, over a pool and a registry.

    async with variants.use("smollm2-135m:mine") as model:
        ...  # the version of "mine" that served when the block began, whatever is promoted meanwhile

The registry is watched by a look at one file's state for each request (microseconds), so that what
`Registry.promote` of any process has acknowledged answers every request that comes after it.
MODEL:ADAPTER@DIGEST names one version, promoted or not. A model that is itself called so comes first.
After a rollback to no adapter at all, the name is answered by the model alone, so that no client breaks.
Everything here runs on the pool's event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lichen.adapters.registry import NAME, STANDING, Registry
from lichen.adapters.versions import BASE, Standing
from lichen.errors import AdapterError, LichenError, NotFound
from lichen.runtime.pool import ModelPool
from lichen.runtime.resident import Candidate, ModelStatus

if TYPE_CHECKING:
    from lichen.runtime.lives import Lives
    from lichen.runtime.served_model import ServedModel

Stamp = tuple[int, int, int]


class Catalogue:
    """What serves under the names of a registry, read again only when it has changed. Thread-safe."""

    def __init__(self, registry: Registry, lives: Lives | None = None) -> None:
        """lives: count what is answered under a name."""
        self.registry = registry
        self._lives = lives
        self._known: dict[str, tuple[Stamp, Standing]] = {}
        self._hashes: dict[tuple[Path, Stamp], str] = {}

    def has(self, name: str) -> bool:
        """Whether there is an adapter of this name."""
        return NAME.fullmatch(name) is not None and _stamp(self._path(name)) is not None

    async def standing(self, name: str) -> Standing:
        """What serves under a name now. Raises NotFound."""
        stamp = _stamp(self._path(name))
        if stamp is None:
            raise NotFound(f"There is no adapter {name!r}.", hint="'lichen adapters list' shows them.")
        known = self._known.get(name)
        if known is None or known[0] != stamp:
            known = self._known[name] = (stamp, await asyncio.to_thread(self.registry.standing, name))
        return known[1]

    async def apply(self, model: ServedModel, adapter: str) -> ServedModel:
        """A model as it answers with an adapter, NAME or NAME@DIGEST; `release` it in the end.

        Raises NotFound, AdapterError when it is for another model, and what loading raises.
        """
        name, _, version = adapter.partition("@")
        standing = await self.standing(name)
        if standing.base != await asyncio.to_thread(self.sha256, model.path, model.info.sha256):
            raise AdapterError(
                f"The adapter {name} was not trained for {model.info.name}.",
                hint="'lichen adapters show' says for which model it is.",
                param="model",
            )
        digest = standing.active
        if version:
            digest = (await asyncio.to_thread(self.registry.version, name, version)).digest
        elif not standing.history:
            raise NotFound(
                f"No version of the adapter {name} serves yet.",
                hint=f"Choose one: lichen adapters promote {name}",
                param="model",
            )
        view = await model.adapted(adapter, digest, self.registry.place(name, digest or ""))
        if (
            self._lives is not None and not version
        ):  # who asks for a version tries it, and does not live with it
            view.life = self._lives.told(name, digest or BASE)
        return view

    def sha256(self, path: Path, known: str = "") -> str:
        """The hash of a model's file, worked out once where it is not known. Blocks."""
        stamp = _stamp(path)
        if known or stamp is None:
            return known
        found = self._hashes.get((path, stamp))
        if found is None:
            with path.open("rb") as file:
                found = self._hashes[(path, stamp)] = hashlib.file_digest(file, "sha256").hexdigest()
        return found

    def variants(self, models: list[Candidate]) -> list[Candidate]:
        """What can be asked for beside the models themselves. Blocks."""
        names = self.registry.names()
        standings = {name: self.registry.standing(name) for name in names}
        return [
            msgspec.structs.replace(
                model,
                name=f"{model.name}:{name}",
                sha256=self.sha256(model.path, model.sha256),
                base=model.name,
                adapter=standing.active or "",
            )
            for model in models
            for name, standing in standings.items()
            if standing.history and standing.base == self.sha256(model.path, model.sha256)
        ]

    def _path(self, name: str) -> Path:
        return self.registry.folder / name / STANDING


class Variants:
    """See the module. catalogue: None where no adapters are served."""

    def __init__(self, pool: ModelPool, catalogue: Catalogue | None) -> None:
        self.pool = pool
        self._catalogue = catalogue

    @asynccontextmanager
    async def use(
        self, name: str | None = None, keep_alive: float | None = None
    ) -> AsyncIterator[ServedModel]:
        """As `ModelPool.use`, also for a model with an adapter, which stays the same within the block."""
        base, adapter = await self.split(name)
        async with self.pool.use(base, keep_alive) as model:
            if not adapter or self._catalogue is None:
                yield model
                return
            view = await self._catalogue.apply(model, adapter)
            try:
                yield view
            finally:
                view.release()

    async def split(self, name: str | None) -> tuple[str | None, str]:
        """The model's name and the adapter's, empty for none."""
        head, colon, tail = (name or "").rpartition(":")
        if name is None or self._catalogue is None or not colon:
            return name, ""
        if not self._catalogue.has(tail.partition("@")[0]):
            return name, ""
        if self.pool.served(name) is not None or await asyncio.to_thread(self._is_model, name):
            return name, ""
        return head or None, tail

    async def known(self) -> list[Candidate]:
        """Every model that could be loaded, the default one first, then those with an adapter."""
        models = await self.pool.known()
        if self._catalogue is None:
            return models
        return models + await asyncio.to_thread(self._catalogue.variants, models)

    async def load(
        self,
        name: str | None = None,
        *,
        pin: bool | None = None,
        keep_alive: float | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> ModelStatus:
        """As `ModelPool.load`; with an adapter, `pin` is about that one."""
        base, adapter = await self.split(name)
        if not adapter:
            return await self.pool.load(base, pin=pin, keep_alive=keep_alive, progress=progress)
        await self.pool.load(base, keep_alive=keep_alive, progress=progress)
        async with self.use(name, keep_alive) as model:
            if pin is not None and model.adaptation:
                model.adapters.pin(model.adaptation.digest, pin)
        return await self.pool.load(base, keep_alive=keep_alive)

    async def unload(self, name: str | None = None) -> int:
        """As `ModelPool.unload`; with an adapter only that one goes. Raises NotFound, Unavailable."""
        base, adapter = await self.split(name)
        if not adapter or self._catalogue is None:
            return await self.pool.unload(base)
        model = self.pool.served(base)
        digest = (await self._catalogue.standing(adapter.partition("@")[0])).active
        if model is None or digest is None:
            raise NotFound(f"The model {name!r} is not loaded.", param="model")
        return model.adapters.drop(digest)

    def _is_model(self, name: str) -> bool:
        try:
            self.pool.shelf.find(name)
        except LichenError:
            return False
        return True


def _stamp(path: Path) -> Stamp | None:
    """What changes whenever a file is replaced; None where there is none."""
    try:
        found = os.stat(path)  # noqa: PTH116 - for each request; Path.stat takes twice as long
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size)
