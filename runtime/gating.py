"""The gate, measured in the serving engine: an exported adapter against what serves now.

`EngineScorer` is what `adapters/gate.py` measures through; `settle` measures, decides, writes the decision
into the registry, and lets the version serve or not. General answers are the model's own, made here and now,
so that nothing has to be at hand but prompts.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from lichen.adapters.events import EventLog, Settled
from lichen.adapters.gate import AnswerScore, Judged, Limits, Scores, Skill, Trial, Verdict, judge, measure
from lichen.adapters.launch import EVENTS, EXAMPLES
from lichen.adapters.registry import Registry
from lichen.adapters.task import Checkpoint, Example, Examples
from lichen.adapters.versions import Note, Version
from lichen.errors import EngineError, GateError, NotFound
from lichen.quant.adapter_check import check_adapter
from lichen.quant.gguf_check import check_gguf
from lichen.runtime import native

log = logging.getLogger("lichen.learning")

BATCH = 256  # tokens of a step
OUTPUTS = 32  # rows of logits of a step: each takes four bytes for every token of the vocabulary
MEASURED = 128  # held-out answers at most
PROMPTS = 24  # general ones that are answered
ANSWER = 32  # tokens of such an answer

Progress = Callable[[str, int, int], None]


class EngineScorer:
    """Scores known answers with a model's file and an adapter's. Blocks; belongs to one thread.

    window: tokens of the longest example. Raises ModelFileError, EngineError, AdapterError.
    """

    def __init__(self, model: Path, *, window: int, threads: int) -> None:
        check_gguf(model)
        self._path = model
        self._model = native.Model(model)
        size = native.ContextSize(context=window, slots=1, threads=threads, batch=BATCH, outputs=OUTPUTS)
        try:
            self._context = native.Context(self._model, size)
        except BaseException:
            self._model.close()
            raise
        self._adapter: native.Adapter | None = None
        self._applied: Path | None = None
        self._held: list[int] = []  # what the KV cache holds
        self.tell: Callable[[], None] = lambda: None  # called after each example

    def score(self, examples: Sequence[Example], adapter: Path | None) -> list[AnswerScore]:
        """Each example's answer after its prompt."""
        self._apply(adapter)
        return [self._score(example) for example in examples]

    def answers(self, prompts: Sequence[Sequence[int]], ends: Sequence[int]) -> list[Example]:
        """What the model alone answers greedily to prompts, each at most ANSWER tokens."""
        self._apply(None)
        found = []
        for prompt in prompts:
            answer: list[int] = []
            while len(answer) < ANSWER and not (answer and answer[-1] in ends):
                self._compute([*prompt, *answer], len(prompt) + len(answer) - 1)
                answer.append(int(self._context.logits(0).argmax()))
            found.append(Example(list(prompt), answer))
        return found

    def close(self) -> None:
        """Give the memory back; idempotent."""
        self._context.close()
        if self._adapter is not None:
            self._adapter.close()
        self._model.close()

    def _apply(self, adapter: Path | None) -> None:
        if adapter == self._applied:
            return
        self._context.adapt(None, 1.0)
        if self._adapter is not None:
            self._adapter.close()
            self._adapter = None
        if adapter is not None:
            check_adapter(adapter, self._path)
            self._adapter = native.Adapter(self._model, adapter)
            self._context.adapt(self._adapter, 1.0)
        self._applied = adapter
        self._forget()

    def _score(self, example: Example) -> AnswerScore:
        """-log p of the answer in nats, in double precision; whether each of its tokens is the likeliest."""
        import numpy as np

        whole = [*example.prompt, *example.answer]
        loss, exact = 0.0, True
        for start in range(len(example.prompt) - 1, len(whole) - 1, OUTPUTS):
            end = min(start + OUTPUTS, len(whole) - 1)
            self._compute(whole[:end], start)
            for index in range(end - start):
                logits = self._context.logits(index).astype(np.float64)
                token = whole[start + index + 1]
                top = logits.max()
                loss += float(top + np.log(np.exp(logits - top).sum()) - logits[token])
                exact = exact and int(logits.argmax()) == token
        self.tell()
        return AnswerScore(loss, len(example.answer), exact)

    def _compute(self, tokens: Sequence[int], first: int) -> None:
        """Compute tokens, with logits from index `first` on; what the cache holds is not repeated."""
        shared = 0
        while shared < min(len(self._held), first) and self._held[shared] == tokens[shared]:
            shared += 1
        if not self._context.truncate(0, shared):
            self._forget()
            shared = 0
        del self._held[shared:]
        for start in range(shared, first, BATCH):
            self._decode(tokens[start : min(start + BATCH, first)], start, outputs=False)
        self._decode(tokens[first:], first, outputs=True)
        self._held[:] = tokens

    def _decode(self, tokens: Sequence[int], start: int, *, outputs: bool) -> None:
        count = len(tokens)
        wanted = [int(outputs)] * count
        code = self._context.decode(list(tokens), list(range(start, start + count)), [0] * count, wanted)
        if code != native.DECODE_OK:
            self._forget()
            raise EngineError(f"The engine could not score an answer: decoding failed with code {code}.")

    def _forget(self) -> None:
        self._context.clear(0)
        self._held.clear()


def settle(
    registry: Registry,
    version: Version,
    model: Path,
    examples: Examples,
    limits: Limits,
    *,
    threads: int,
    progress: Progress = lambda _what, _done, _of: None,
    promote: bool = True,
    half: Version | None = None,
) -> Verdict:
    """Measure a version beside what serves, note the decision, and let it serve if it may. Blocks.

    half: the same training after half of its steps. It is measured beside the other, and the one that
    `Verdict.kept` names stays in the registry.

    The lesson is compared with the version that serves now, general answers with the model alone, so that
    small losses do not add up from version to version. Raises GateError where there is too little to measure
    on (noted as well), and what scoring and the registry raise.
    """
    rivals = [one for one in (version, half) if one is not None]
    try:
        before, *measured = _measured(registry, rivals, model, examples, threads, progress)
    except BaseException as error:
        if isinstance(error, GateError):
            registry.note(version.name, version.digest, Note(kind="gate", values={"reason": str(error)}))
        _drop(registry, rivals, version.digest)
        raise
    scores = {rival.digest: found for rival, found in zip(rivals, measured, strict=True)}
    checkpoints: dict[str, Checkpoint] = {} if half is None else {half.digest: "half", version.digest: "end"}
    verdict = judge(before, scores, limits, checkpoints)
    registry.note(version.name, verdict.kept.name, Note(kind="gate", values=msgspec.to_builtins(verdict)))
    if promote and verdict.chosen is not None:
        registry.promote(version.name, verdict.chosen)
    _drop(registry, rivals, verdict.kept.name)
    return verdict


def _measured(
    registry: Registry,
    rivals: Sequence[Version],
    model: Path,
    examples: Examples,
    threads: int,
    progress: Progress,
) -> list[Scores]:
    """Scores of what serves now, and of each rival. Raises GateError and what scoring raises."""
    name = rivals[0].name
    active = registry.active(name)
    now = None if active is None else registry.file(name, active.digest)
    trial = _trial(examples)
    window = max(len(one.prompt) + max(len(one.answer), ANSWER) for one in _all(trial, examples)) + 1
    scorer = EngineScorer(model, window=window, threads=threads)
    try:
        progress("general answers", 0, 1)
        general = scorer.answers(examples.asked[:PROMPTS], examples.ends) or trial.general
        trial = msgspec.structs.replace(trial, general=general)
        _count(scorer, trial, 1 + len(rivals), progress)
        before = measure(scorer, trial, now)
        if now is not None:
            alone = Skill(answers=scorer.score(trial.general, None)) if trial.general else None
            before = msgspec.structs.replace(before, general=alone)
        return [before, *(measure(scorer, trial, registry.file(name, rival.digest)) for rival in rivals)]
    finally:
        scorer.close()


def _drop(registry: Registry, rivals: Sequence[Version], kept: str) -> None:
    """Take out of the registry what lost, unless it served before."""
    for rival in rivals:
        if rival.digest not in (kept, *registry.standing(rival.name).history):
            with contextlib.suppress(NotFound):  # there was no room for it
                registry.remove(rival.name, rival.digest)


def let_decide(
    registry: Registry,
    version: Version,
    model: Path,
    folder: Path,
    limits: Limits,
    half: Version | None = None,
) -> Judged | None:
    """Let the gate measure a training's adapters on what its job kept for that, and serve the better one.

    The one that is kept, None where there was too little to measure on. Told in the job's events. Blocks.
    """
    examples = msgspec.json.decode((folder / EXAMPLES).read_bytes(), type=Examples)
    try:
        verdict = settle(registry, version, model, examples, limits, threads=1, half=half)
    except GateError as error:
        log.warning("The adapter %s does not serve by itself: %s", version.name, error)
        with contextlib.closing(EventLog(folder / EVENTS)) as tell:
            tell(Settled(checkpoint="end", faults=(str(error),)))
        return None
    kept = verdict.kept
    losses: dict[str, float | None] = {
        judged.checkpoint: judged.numbers.loss for judged in verdict.candidates
    }
    with contextlib.closing(EventLog(folder / EVENTS)) as tell:
        tell(Settled(checkpoint=kept.checkpoint, losses=losses, faults=tuple(kept.faults)))
    for fault in kept.faults:
        log.warning("The adapter %s does not serve: %s", version.name, fault)
    return kept


def _trial(examples: Examples) -> Trial:
    taken = min(MEASURED, len(examples.held_out))
    spread = [examples.held_out[index * len(examples.held_out) // taken] for index in range(taken)]
    earlier = {"earlier lessons": examples.earlier[:MEASURED]} if examples.earlier else {}
    return Trial(lesson=spread, earlier=earlier, general=examples.general[:PROMPTS])


def _all(trial: Trial, examples: Examples) -> list[Example]:
    longest = max((one for one in trial.lesson), key=lambda one: len(one.answer), default=Example([0], [0]))
    prompts = [*examples.asked[:PROMPTS], *(one.prompt for one in (*trial.lesson, *trial.general))]
    crossed = [Example(prompt, longest.answer) for prompt in prompts]  # any answer after any question
    return [*crossed, *trial.general, *(one for part in trial.earlier.values() for one in part)]


def _count(scorer: EngineScorer, trial: Trial, times: int, progress: Progress) -> None:
    """Tell how many of all examples were scored, after each."""
    of = times * (2 * len(trial.lesson) + len(trial.general) + sum(map(len, trial.earlier.values())))
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        progress("answers in the engine", min(done, of), of)

    scorer.tell = tell
