"""A model with a dozen tokens and no rounding, in place of llama.cpp: its logits are a function of the last
two tokens, its sampler is a page of Python. Whatever speculation does to an answer shows here exactly.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import random
from collections import Counter
from collections.abc import Sequence as Items
from typing import Any

import numpy as np

from lichen.runtime.engine import Engine
from lichen.runtime.generation import Generation, Mailbox
from lichen.runtime.native import SamplerOptions
from lichen.runtime.sequence import SamplingOptions, Sequence
from lichen.runtime.speculation.control import Controller, Offer
from lichen.runtime.speculation.drafter import NOTHING, Draft, Drafter
from lichen.runtime.speculation.plan import Speculation
from tests.runtime.fake_native import CountingContext

VOCABULARY = 12
END = 11
DRAFTED = 8  # tokens of all sequences in one step


class SmallModel:
    vocab_size = VOCABULARY
    cuttable = True

    def is_end(self, token: int) -> bool:
        return token == END

    def piece(self, token: int) -> bytes:
        return f"{token} ".encode()


def logits_after(prefix: Items[int]) -> Any:
    """[vocab] float32: a made-up function of the last two tokens, some choices clear and some close."""
    return _row(tuple(prefix[-2:])).copy()


@functools.cache
def _row(pair: tuple[int, ...]) -> Any:
    seed = hashlib.blake2b(repr(pair).encode(), digest_size=8).digest()
    row = np.random.default_rng(int.from_bytes(seed, "little")).normal(0.0, 2.0, VOCABULARY)
    row[END] -= 3.0
    return row.astype(np.float32)


class SmallContext(CountingContext):
    """Knows, after each decode, the prefix that each logits row belongs to."""

    def __init__(self, **size: int) -> None:
        super().__init__(**size)
        self.rows: list[Any] = []

    def decode(
        self, tokens: Items[int], positions: Items[int], slots: Items[int], outputs: Items[int]
    ) -> int:
        before = {slot: list(held) for slot, held in self.held.items()}
        code = super().decode(tokens, positions, slots, outputs)
        self.rows = []
        for token, slot, wanted in zip(tokens, slots, outputs, strict=True):
            before[slot].append(token)
            self.rows.append(logits_after(before[slot]) if wanted else None)
        return code

    def logits(self, index: int) -> Any:
        assert self.rows[index] is not None, "logits were asked for at this index"
        return self.rows[index]


class SmallSampler:
    """Bias, penalties, temperature and a seeded draw, with the memory that they need."""

    def __init__(self, model: SmallModel, options: SamplerOptions) -> None:
        self._options = options
        self._chance = random.Random(options.seed)
        self._seen: Counter[int] = Counter()

    def accept(self, token: int) -> None:
        self._seen[token] += 1

    def sample(self, context: SmallContext, index: int) -> int:
        options, row = self._options, context.logits(index).astype(np.float64).copy()
        for token, bias in options.logit_bias:
            row[token] += bias
        for token, count in self._seen.items():
            row[token] -= options.presence_penalty + options.frequency_penalty * count
        if options.temperature <= 0:
            token = int(row.argmax())
        else:
            weights = np.exp((row - row.max()) / options.temperature)
            token = self._chance.choices(range(VOCABULARY), weights.tolist())[0]
        self.accept(token)
        return token

    def close(self) -> None: ...


class EvenOnly:
    """A grammar of even numbers that rise to at most `last` of them, in place of a compiled one."""

    failure = None

    def __init__(self, last: int) -> None:
        self._left = last

    def mask(self, logits: Any) -> None:
        logits[1::2] = -np.inf

    def accept(self, token: int) -> None:
        assert token % 2 == 0
        self._left -= 1

    @property
    def complete(self) -> bool:
        return self._left == 0


class Eager(Controller):
    """Always drafts as much as is offered and there is room for."""

    def allowance(self, runs: Items[int], room: int) -> int:
        return room

    def lengths(self, runs: Items[int], offers: Items[Offer], room: int) -> list[int]:
        taken = []
        for offer in offers:
            taken.append(min(len(offer.chances), room))
            room -= taken[-1]
        return taken

    def length_at_cost(
        self, runs: Items[int], run: int, chances: Items[float], token_s: float, room: int
    ) -> tuple[int, float]:
        return min(len(chances), room), float("inf")


class Told:
    """Drafts what `script` makes of a sequence's tokens."""

    name = "told"
    token_s = 0.0

    def __init__(self, script: Any) -> None:
        self.script = script

    def begin(self, sequence: Sequence) -> None: ...

    def end(self, sequence: Sequence) -> None: ...

    def close(self) -> None: ...

    def observe(self, sequence: Sequence, draft: Draft, accepted: int) -> None:
        assert 0 <= accepted <= len(draft.tokens)

    def propose(self, sequence: Sequence, k: int) -> Draft:
        tokens = list(self.script(sequence.tokens))[:k]
        return Draft(tokens, self.name) if tokens else NOTHING


def likeliest(tokens: Items[int], count: int = 6) -> list[int]:
    """What greedy decoding would say next."""
    text = list(tokens[-2:])
    for _ in range(count):
        text.append(int(logits_after(text).argmax()))
    return text[-count:]


class SmallBench:
    """An engine over a small context; drafters are tried as eagerly as can be."""

    def __init__(
        self, drafters: Items[Drafter] = (), *, slots: int = 3, context: int = 96, batch: int = 16
    ) -> None:
        self.context = SmallContext(slots=slots, context=context, batch=batch, outputs=slots + DRAFTED)
        self.speculation = Speculation(drafters, width=batch, outputs=slots + DRAFTED, context=context)
        self.speculation.controller = Eager()
        model: Any = SmallModel()
        native: Any = self.context
        self.engine = Engine(model, native, queue_limit=64, speculation=self.speculation)

    def submit(self, prompt: list[int], *, grammar: int = 0, **options: Any) -> Generation:
        constraint: Any = EvenOnly(grammar) if grammar else None
        mailbox = Mailbox()
        sequence = Sequence(
            prompt=prompt, options=SamplingOptions(**options), mailbox=mailbox, constraint=constraint
        )
        self.engine.submit(sequence)
        return Generation(sequence, mailbox, self.engine.cancel)

    async def settled(self) -> None:
        for _ in range(1000):
            counters = self.engine.counters()
            if not counters.running and not counters.waiting:
                return
            await asyncio.sleep(0.002)
        raise AssertionError(f"still busy: {counters}")
