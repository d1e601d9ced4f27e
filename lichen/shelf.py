"""The models that a daemon may load: the configured one, and whatever is in the store.

Every method blocks (small files are read, models are loaded). Nothing here uses the network.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from lichen.api import load_file, local_file, model_options
from lichen.config import Config
from lichen.errors import LichenError, ModelFileError, NotFound
from lichen.quant.gguf_check import GGUFSummary, check_gguf
from lichen.runtime import memory
from lichen.runtime.chat import capabilities
from lichen.runtime.memory import Fitted
from lichen.runtime.resident import Candidate
from lichen.runtime.served_model import ServedModel
from lichen.sync.store import ModelManifest, Store

DEFAULT = "default"


class Layout(msgspec.Struct, frozen=True):
    """Another file that the default model is loaded from, and its sha256."""

    path: Path
    sha256: str


class StoreShelf:
    """`runtime.resident.Shelf` over a configuration and its store."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._store = Store(config.home / "store", offline=True)
        self._options = model_options(config)
        self._layout: Layout | None = None
        self._summaries: dict[Path, GGUFSummary] = {}
        self._lock = threading.Lock()

    def replan(self, config: Config, layout: Layout | None) -> None:
        """From now on, load with the settings of another configuration, and the default model from another
        file. What is loaded stays as it is."""
        self._config, self._options, self._layout = config, model_options(config), layout

    def known(self) -> list[Candidate]:
        """The configured model, if it is here, then those of the store by name."""
        there = {manifest.name: manifest for manifest in self._store.manifests()}
        first = self._default()
        candidates = [first] if first is not None else []
        candidates += [
            self._candidate(manifest)
            for manifest in there.values()
            if first is None or manifest.name != first.name
        ]
        return candidates

    def find(self, name: str) -> Candidate:
        """A model by its name in the store, a catalog name or a source; "default" is the configured one.

        Raises NotFound: a request never downloads.
        """
        default = self._default()
        if default is not None and name in (DEFAULT, default.name):
            return default
        try:
            manifest = None if name == DEFAULT else self._store.resolve(name)
        except LichenError:
            manifest = None  # such as a text that cannot be a name
        if manifest is None:
            there = ", ".join(candidate.name for candidate in self.known()[:16])
            raise NotFound(
                f"The model {name!r} is not here.",
                hint=f"Served: {there}." if there else "Get one: lichen pull",
                param="model",
            )
        return self._candidate(manifest)

    def fit(self, candidate: Candidate, free: int | None) -> Fitted:
        """How to load a model with so many bytes free. Raises OutOfMemory, ModelFileError."""
        summary = self._summary(candidate.path)
        if free is None:
            return Fitted(options=self._options, estimate=memory.estimate(summary, self._options))
        return memory.fitted(candidate.name, summary, self._options, free)

    def load(self, candidate: Candidate, fitted: Fitted, progress: Callable[[float], bool]) -> ServedModel:
        """Load it. Raises what `ServedModel.load` raises."""
        return load_file(
            candidate.path, name=candidate.name, sha256=candidate.sha256, fitted=fitted, progress=progress
        )

    def _default(self) -> Candidate | None:
        asked = self._asked()
        if asked is None or self._layout is None:
            return asked
        return msgspec.structs.replace(
            asked,
            path=self._layout.path,
            sha256=self._layout.sha256,
            size=self._layout.path.stat().st_size,
        )

    def _asked(self) -> Candidate | None:
        """The configured model, in the file that was asked for."""
        path = local_file(self._config.model)
        if path is not None:
            return Candidate(
                name=path.stem,
                path=path,
                size=path.stat().st_size,
                capabilities=self._capabilities(path),
            )
        manifest = self._store.resolve(self._config.model)
        return None if manifest is None else self._candidate(manifest)

    def _candidate(self, manifest: ModelManifest) -> Candidate:
        path = self._store.blob_path(manifest)
        return Candidate(
            name=manifest.name,
            path=path,
            sha256=manifest.sha256,
            size=manifest.size,
            architecture=manifest.architecture,
            context_train=manifest.context_train,
            capabilities=self._capabilities(path),
        )

    def _capabilities(self, path: Path) -> tuple[str, ...]:
        try:
            template = self._summary(path).metadata.get("tokenizer.chat_template")
        except ModelFileError:
            return ()
        return capabilities(template if isinstance(template, str) else None)

    def _summary(self, path: Path) -> GGUFSummary:
        """A file's header, read once. Raises ModelFileError."""
        with self._lock:
            summary = self._summaries.get(path)
        if summary is None:
            summary = check_gguf(path)
            with self._lock:
                self._summaries[path] = summary
        return summary
