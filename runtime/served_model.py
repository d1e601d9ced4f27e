"""A model that is ready to answer: weights, chat template and engine, behind two verbs.

`chat` and `complete` turn what a caller has (messages, or text) into tokens off the event loop, and
submit a sequence to the engine. The HTTP daemon and the embedded API are both users of this class.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lichen.errors import RequestError
from lichen.runtime.chat import ChatTemplate, Message
from lichen.runtime.engine import Engine
from lichen.runtime.generation import Generation, Mailbox
from lichen.runtime.native import Context, ContextSize, Model
from lichen.runtime.sequence import SamplingOptions
from lichen.runtime.sequence import Sequence as LiveSequence

if TYPE_CHECKING:
    from lichen.runtime.memory import Fitted

INLINE_CHARACTERS = 2048  # shorter texts are tokenized on the loop: under a millisecond


class ModelOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to run a model. context: tokens a sequence (0: what it was trained for). slots: sequences at
    once. threads: for computing. queue: sequences that may wait. batch: tokens a step."""

    context: int = 4096
    slots: int = 4
    threads: int = 1
    queue: int = 64
    batch: int = 256


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a client may know of a served model."""

    name: str
    sha256: str
    size: int
    architecture: str
    context: int
    slots: int


class ServedModel:
    """One loaded model. Make it with `load`; close it with `close`, which waits for nothing."""

    def __init__(self, name: str, sha256: str, model: Model, engine: Engine, options: ModelOptions) -> None:
        self.engine = engine
        self.options = options
        self.fitted: Fitted | None = None  # how it was made to fit in memory, where somebody asked
        self._model = model
        self.template = ChatTemplate(
            model.chat_template(), bos=model.special_text(model.bos), eos=model.special_text(model.eos)
        )
        self.info = ModelInfo(
            name=name,
            sha256=sha256,
            size=model.weight_bytes,
            architecture=model.metadata("general.architecture") or "unknown",
            context=engine.context.context,
            slots=options.slots,
        )
        self.names = frozenset({name, "default"})
        self._bos_text = model.special_text(model.bos)
        self._preparing = ThreadPoolExecutor(max_workers=2, thread_name_prefix="lichen-prepare")

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        name: str,
        sha256: str,
        options: ModelOptions,
        progress: Callable[[float], bool] | None = None,
    ) -> ServedModel:
        """Load a checked GGUF and start its engine. Blocks for the load: call it off the event loop.

        Raises ModelFileError, EngineError, or TemplateError for a template that does not compile.
        """
        model = Model(path, progress=progress)
        try:
            context = Context(
                model,
                ContextSize(
                    context=min(options.context or model.context_train, model.context_train or 1 << 20),
                    slots=options.slots,
                    threads=options.threads,
                    batch=max(options.batch, options.slots),
                ),
            )
        except BaseException:
            model.close()
            raise
        engine = Engine(model, context, queue_limit=options.queue)
        try:
            return cls(name, sha256, model, engine, options)
        except BaseException:
            engine.close()
            model.close()
            raise

    async def chat(self, messages: Sequence[Message], options: SamplingOptions) -> Generation:
        """Answer a conversation. Raises what the template, the tokenizer and `Engine.submit` raise."""
        return self._submit(await self._prepare(functools.partial(self.chat_tokens, messages)), options)

    async def complete(self, prompt: str | list[int], options: SamplingOptions) -> Generation:
        """Continue a text, or token ids, as they are."""
        if isinstance(prompt, list):
            return self._submit(self._checked_tokens(prompt), options)
        encode = functools.partial(self._model.tokenize, prompt, special=True, add_bos=True)
        tokens = encode() if len(prompt) < INLINE_CHARACTERS else await self._prepare(encode)
        return self._submit(tokens, options)

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """Token ids [n] of a rendered conversation. Blocks: milliseconds for long ones."""
        text = self.template.render(messages)
        has_bos = bool(self._bos_text) and text.startswith(self._bos_text)
        return self._model.tokenize(text, special=True, add_bos=not has_bos)

    def close(self) -> None:
        """End what runs and give all memory back. Blocks; idempotent."""
        self._preparing.shutdown(wait=False, cancel_futures=True)
        self.engine.close()
        self._model.close()

    def _submit(self, tokens: list[int], options: SamplingOptions) -> Generation:
        if not tokens:
            raise RequestError("The prompt is empty.", param="prompt")
        mailbox = Mailbox()
        sequence = LiveSequence(prompt=tokens, options=options, mailbox=mailbox)
        self.engine.submit(sequence)
        return Generation(sequence, mailbox, self.engine.cancel)

    def _checked_tokens(self, tokens: list[int]) -> list[int]:
        for token in tokens:
            if not 0 <= token < self._model.vocab_size:
                raise RequestError(
                    f"Token {token} is not in this model's vocabulary of {self._model.vocab_size}.",
                    param="prompt",
                )
        return tokens

    async def _prepare(self, work: Callable[[], list[int]]) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work)
