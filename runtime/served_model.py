"""A model that is ready to answer: weights, chat template and engine, behind two verbs.

`chat` and `complete` turn what a caller has (messages, or text) into tokens off the event loop, and
submit a sequence to the engine. The HTTP daemon and the embedded API are both users of this class.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from lichen.errors import RequestError, UnsupportedField
from lichen.runtime.adaptation import PLAIN, Adaptation
from lichen.runtime.adapters import DEFAULT_LIMIT, Adapters, Lease
from lichen.runtime.answer import THINK_BEGIN, THINK_END, AnswerReader, Thinking
from lichen.runtime.answer_form import AnswerForm, Schema
from lichen.runtime.chat import Message, capabilities
from lichen.runtime.constraint import Constraint, Grammars
from lichen.runtime.embedding import Embedder
from lichen.runtime.engine import Engine
from lichen.runtime.engine_start import start_engine
from lichen.runtime.generation import Generation, Mailbox
from lichen.runtime.grammar import json_grammar, whole_grammar
from lichen.runtime.metrics import EngineMetrics
from lichen.runtime.native import Model
from lichen.runtime.prompt import PromptWriter
from lichen.runtime.scheduler import PREFILL_SHARE
from lichen.runtime.sequence import LOCAL, SamplingOptions
from lichen.runtime.sequence import Sequence as LiveSequence
from lichen.runtime.speculation.build import SpeculationOptions

if TYPE_CHECKING:
    from lichen.runtime.memory import Fitted

T = TypeVar("T")

INLINE_CHARACTERS = 2048  # shorter texts are tokenized on the loop: under a millisecond


class ModelOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to run a model. context: tokens a sequence (0: what it was trained for). slots: sequences at
    once. threads: for computing. queue: sequences that may wait. batch: tokens a step. chunk: tokens that
    each waiting prompt may put between two tokens of a stream. kv_type: how keys and values are stored.
    spill_folder: where long beginnings of prompts are kept, at most `spill_limit` bytes; None for nowhere.
    speculation: what drafts tokens. adapters: bytes that adapters in memory may take."""

    context: int = 4096
    slots: int = 4
    threads: int = 1
    queue: int = 64
    batch: int = 256
    chunk: int = PREFILL_SHARE
    kv_type: str = "f16"
    spill_folder: Path | None = None
    spill_limit: int = 2_000_000_000
    speculation: SpeculationOptions = SpeculationOptions()
    adapters: int = DEFAULT_LIMIT

    @property
    def outputs(self) -> int:
        """Tokens of a step that may have logits."""
        return self.slots + self.speculation.extra_outputs


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a client may know of a served model."""

    name: str
    sha256: str
    size: int
    architecture: str
    context: int
    slots: int
    capabilities: tuple[str, ...] = ()


class ServedModel:
    """One loaded model. Make it with `load`; close it with `close`, which waits for nothing.

    path: its file. adapter: the name that it answers under, "" for its own. life: is told of each answer that
    was given with the adapter as it is, once it is complete; on the event loop of whoever reads it.
    """

    adapter = ""
    life: Callable[[LiveSequence], None] | None = None

    def __init__(
        self, name: str, sha256: str, path: Path, model: Model, engine: Engine, options: ModelOptions
    ) -> None:
        self.path = path
        self.adapters = Adapters(engine, path, options.adapters)
        self.adaptation = PLAIN
        self._lease: Lease | None = None
        self.engine = engine
        self.options = options
        self.metrics = engine.observer = EngineMetrics()
        self._speculation = engine.speculation
        self.learning = engine.speculation.learning
        self.fitted: Fitted | None = None  # how it was made to fit in memory, where somebody asked
        self._model = model
        self._writer = PromptWriter(model)
        self.template, self._tools = self._writer.template, self._writer.tools
        self.info = ModelInfo(
            name=name,
            sha256=sha256,
            size=model.weight_bytes,
            architecture=model.metadata("general.architecture") or "unknown",
            context=engine.context.context,
            slots=options.slots,
            capabilities=capabilities(model.chat_template()),
        )
        self.names = frozenset({name, "default"})
        self._grammars = Grammars(model)
        markers = (self._tools.marker, self._tools.before_arguments, THINK_BEGIN, THINK_END)
        tokens = {marker: model.reveal(marker) for marker in markers}
        self._marks = {marker: token for marker, token in tokens.items() if token is not None}
        self.embedder = Embedder(model, engine, threads=options.threads)
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
        with contextlib.ExitStack() as undo:
            model = Model(path, progress=progress)
            undo.callback(model.close)
            engine = start_engine(model, path, sha256, options)
            undo.callback(engine.close)
            served = cls(name, sha256, path, model, engine, options)
            if served.learning is not None:
                served.learning.start(engine.call)
            undo.pop_all()
            return served

    async def adapted(self, adapter: str, digest: str | None, file: Path) -> ServedModel:
        """This model as it answers with an adapter of that name, which stays in memory until `release` and
        the end of what was asked of it; all else is shared. digest: None for the model alone under that name.

        Raises what `Adapters.lease` raises.
        """
        view = copy.copy(self)
        view.info = msgspec.structs.replace(self.info, name=f"{self.info.name}:{adapter}")
        view.adapter = adapter.partition("@")[0]
        if digest is not None:
            view._lease = await self.adapters.lease(digest, file)
            view.adaptation = Adaptation(digest, 1.0)
        return view

    def release(self) -> None:
        """Let the adapter of an adapted model go; idempotent."""
        if self._lease is not None:
            self._lease.close()

    async def chat(
        self,
        messages: Sequence[Message],
        options: SamplingOptions,
        form: AnswerForm = AnswerForm(),  # noqa: B008 - immutable
        *,
        count: int = 1,
        owner: str = LOCAL,
        kept: bool = False,
    ) -> list[Generation]:
        """Answer a conversation `count` times, after one prefill. owner: whose past answers may help drafts;
        kept: whether a draft head may learn from these.

        Raises what the template, the tokenizer, the grammar and `Engine.submit` raise.
        """
        work = functools.partial(self._chat_job, messages, form, count)
        tokens, constraints, reader = await self._prepare(work)
        return self._submit(tokens, options, constraints, reader, owner=owner, kept=kept)

    async def complete(
        self,
        prompt: str | list[int],
        options: SamplingOptions,
        *,
        count: int = 1,
        schema: Schema = None,
        owner: str = LOCAL,
        kept: bool = False,
    ) -> list[Generation]:
        """Continue a text, or token ids, as they are. schema: the continuation is JSON that it allows."""
        constraints: list[Constraint | None] = [None] * count
        if schema is not None:
            grammar = whole_grammar(json_grammar(schema), marks=self._marks)
            constraints = await self._prepare(
                lambda: [self._grammars.constraint(grammar, param="response_format") for _ in range(count)]
            )
        if isinstance(prompt, list):
            return self._submit(self._checked_tokens(prompt), options, constraints, owner=owner, kept=kept)
        encode = functools.partial(self.tokenize, prompt)
        tokens = encode() if len(prompt) < INLINE_CHARACTERS else await self._prepare(encode)
        return self._submit(tokens, options, constraints, owner=owner, kept=kept)

    async def embed(
        self, text: str | list[int], *, truncate: bool = False, dimensions: int | None = None
    ) -> tuple[list[float], int]:
        """The vector [width] of a text, of length 1, and how many tokens it was made from.

        truncate: use the first tokens of a text that is too long. Raises ContextOverflow otherwise, and
        UnsupportedField when `dimensions` is not the width.
        """
        if isinstance(text, list):
            tokens = self._checked_tokens(text)
        else:
            tokens = await self._prepare(functools.partial(self.tokenize, text))
        if truncate:
            tokens = tokens[: self.embedder.limit]
        vector = await self.embedder.embed(tokens, self.adaptation)
        if dimensions not in (None, len(vector)):
            raise UnsupportedField(
                f"This model's embeddings have {len(vector)} dimensions; they cannot be cut to {dimensions}.",
                param="dimensions",
            )
        return vector, len(tokens)

    def tokenize(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids [n] of a text; control tokens that are written in it count as such."""
        return self._model.tokenize(text, special=True, add_bos=add_bos)

    def piece(self, token: int) -> bytes:
        """Bytes of a token. Raises RequestError for an id that the vocabulary does not have."""
        return self._model.piece(self._checked_tokens([token])[0])

    def prompt_text(self, messages: Sequence[Message], form: AnswerForm = AnswerForm()) -> str:  # noqa: B008
        """The rendered conversation. Blocks: milliseconds for long ones."""
        return self._writer.text(messages, form.offered)

    def chat_tokens(self, messages: Sequence[Message], form: AnswerForm = AnswerForm()) -> list[int]:  # noqa: B008
        """Token ids [n] of a rendered conversation. Blocks as `prompt_text` does."""
        return self._writer.tokens(self.prompt_text(messages, form))

    def _chat_job(
        self, messages: Sequence[Message], form: AnswerForm, count: int
    ) -> tuple[list[int], list[Constraint | None], Callable[[], AnswerReader]]:
        text = self.prompt_text(messages, form)
        thinking: Thinking = None
        if self.template.thinks:
            thinking = "open" if text.rstrip().endswith(THINK_BEGIN) else "maybe"
        grammar = form.grammar(self._tools, thinking, marks=self._marks)
        constraints = [
            None if grammar is None else self._grammars.constraint(grammar, param=form.param)
            for _ in range(count)
        ]
        reader = functools.partial(
            AnswerReader,
            tools=self._tools if form.offered else None,
            thinking=thinking,
            names=tuple(tool.name for tool in form.offered),
            only_calls=form.only_calls,
        )
        return self._writer.tokens(text), constraints, reader

    def flush_states(self) -> None:
        """Write what was collected of answers up to now, for a draft head. Blocks."""
        from lichen.runtime.speculation.distil import StateCollector

        for reader in self._speculation.readers:
            if isinstance(reader, StateCollector):
                reader.flush()

    def close(self) -> None:
        """End what runs and give all memory back. Blocks; idempotent."""
        self._preparing.shutdown(wait=False, cancel_futures=True)
        if self.learning is not None:
            self.learning.close()
        self.engine.close()
        self._model.close()

    def _submit(
        self,
        tokens: list[int],
        options: SamplingOptions,
        constraints: Sequence[Constraint | None],
        reader: Callable[[], AnswerReader] | None = None,
        *,
        owner: str,
        kept: bool,
    ) -> list[Generation]:
        """One sequence for each constraint; with a seed, each further one has the next seed."""
        if not tokens:
            raise RequestError("The prompt is empty.", param="prompt")
        if not self.adaptation and options.adapter_scale != 1:
            raise RequestError(
                "adapter_scale is for a model that is named with its adapter, as MODEL:ADAPTER.",
                param="adapter_scale",
            )
        adaptation = self.adaptation.scaled(options.adapter_scale)
        life = self.life if adaptation == self.adaptation else None
        sequences = []
        for number, constraint in enumerate(constraints):
            own = options
            if number and options.seed is not None:
                own = msgspec.structs.replace(options, seed=options.seed + number)
            sequences.append(
                LiveSequence(
                    prompt=tokens,
                    options=own,
                    mailbox=Mailbox(),
                    constraint=constraint,
                    owner=owner,
                    adaptation=adaptation,
                    kept=kept,
                    scored=life is not None,
                )
            )
        self.engine.submit(*sequences)
        self.metrics.asked(self.adapter, len(sequences))
        return [
            Generation(
                sequence,
                sequence.mailbox,
                self.engine.cancel,
                reader() if reader else None,
                keep=self._lease,
                life=life,
            )
            for sequence in sequences
        ]

    def _checked_tokens(self, tokens: list[int]) -> list[int]:
        for token in tokens:
            if not 0 <= token < self._model.vocab_size:
                raise RequestError(
                    f"Token {token} is not in this model's vocabulary of {self._model.vocab_size}.",
                    param="prompt",
                )
        return tokens

    async def _prepare(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work)
