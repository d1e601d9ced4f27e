"""From the settings to drafters: which ones a model gets, and what they need."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import msgspec

from lichen.errors import ConfigError, LichenError
from lichen.runtime.native import Context, ContextSize, Model
from lichen.runtime.speculation.answers import AnswerMemories
from lichen.runtime.speculation.drafter import Drafter
from lichen.runtime.speculation.head import HeadDrafter
from lichen.runtime.speculation.model import CATCH_UP, ModelDrafter
from lichen.runtime.speculation.plan import Speculation
from lichen.runtime.speculation.suffix import SuffixDrafter

log = logging.getLogger("lichen.speculation")

EXTRA_OUTPUTS = 32  # drafted tokens of all sequences in one step
Choice = Literal["auto", "off", "suffix", "model", "head"]


class SpeculationOptions(msgspec.Struct, frozen=True, kw_only=True):
    """drafters: which ones; auto is suffix, and model and head where there are some. draft_model: a GGUF
    file. draft_head: the file of a head to begin with. answers_folder: where past answers are remembered, at
    most `answers_limit` bytes; None for nowhere. home: where heads, and what they learn from, are kept.
    distil_limit: bytes for what a head learns from; 0: it does not learn. states: a folder where this is
    collected although nothing learns while serving."""

    drafters: Choice = "off"
    draft_model: Path | None = None
    answers_folder: Path | None = None
    answers_limit: int = 0
    draft_head: Path | None = None
    home: Path | None = None
    distil_limit: int = 0
    states: Path | None = None

    @property
    def extra_outputs(self) -> int:
        """Logits that a step needs beyond one a slot."""
        return 0 if self.drafters == "off" else EXTRA_OUTPUTS

    @property
    def thinks(self) -> bool:
        """Whether a draft model is loaded."""
        return self.drafters == "model" or (self.drafters == "auto" and self.draft_model is not None)

    @property
    def heads(self) -> bool:
        """Whether a draft head may be served."""
        return self.drafters in ("head", "auto") and self.home is not None


def build(
    model: Model,
    context: Context,
    options: SpeculationOptions,
    *,
    path: Path,
    sha256: str,
    identity: str,
    threads: int,
) -> Speculation:
    """The speculation of a context. path: of the model's file; sha256: of its bytes, if it is known.
    identity: of the model, for what is remembered.

    Raises ConfigError, ModelFileError or EngineError for a draft model that cannot be used.
    """
    if options.states is not None:
        from lichen.runtime.speculation.distil import StateCollector

        collector = StateCollector(options.states, options.distil_limit)
        context.wants_states = True
        return Speculation(readers=[collector], width=0, outputs=0, context=0)
    if options.drafters == "off":
        return Speculation.off()
    if not model.cuttable:
        log.warning("This model's memory cannot be cut, so speculation is off for it.")
        return Speculation.off()
    drafters: list[Drafter] = []
    if options.drafters in ("auto", "suffix"):
        folder, limit = options.answers_folder, options.answers_limit
        drafters.append(SuffixDrafter(AnswerMemories(identity, model.vocab_size, folder, limit)))
    if options.thinks:
        drafters.append(_model_drafter(model, context, options.draft_model, threads))
    speculation = Speculation(drafters, width=context.batch, outputs=context.outputs, context=context.context)
    if options.heads:
        _add_head(speculation, model, context, options, path, sha256)
    return speculation


def _add_head(
    speculation: Speculation,
    model: Model,
    context: Context,
    options: SpeculationOptions,
    path: Path,
    sha256: str,
) -> None:
    """A draft head, where there is one or one may be learned; what belongs to it is loaded only here.

    A head that cannot be used is a line in the log, and the model is served without.
    """
    from lichen.runtime.speculation.distil import StateCollector
    from lichen.runtime.speculation.heads import HeadStore, head_folder
    from lichen.runtime.speculation.learning import HeadLearning
    from lichen.sync.download import hash_file

    assert options.home is not None, "heads have a home"
    base = sha256 or hash_file(path)
    folder = head_folder(options.home, base)
    store = HeadStore(folder, base=base, vocabulary=model.vocab_size, hidden=context.hidden)
    head = store.current()
    given = options.draft_head or _brought(options.home / "store", base)
    if head is None and given is not None:
        try:
            head = store.read(given)
            store.add(head)  # what is learned goes on from it
        except (LichenError, OSError) as error:
            log.warning("The draft head is not what it should be. %s", error)
    if head is None and not options.distil_limit:
        return
    drafter = HeadDrafter(head)
    speculation.drafters.append(drafter)
    speculation.readers.append(drafter)
    context.wants_states = True
    if options.distil_limit:
        collector = StateCollector(folder / "states", options.distil_limit)
        speculation.readers.append(collector)
        speculation.learning = HeadLearning(
            path,
            store,
            drafter,
            collector,
            folder=folder / "training",
            step_s=lambda: speculation.controller.costs.seconds(1),
        )


def _model_drafter(target: Model, context: Context, path: Path | None, threads: int) -> ModelDrafter:
    if path is None:
        raise ConfigError("speculation is 'model', but there is no draft model.", hint="Set draft_model.")
    draft = Model(path)
    own: Context | None = None
    try:
        size = min(context.context, draft.context_train or context.context)
        own = Context(
            draft, ContextSize(context=size, slots=context.slots, threads=threads, batch=max(CATCH_UP, 64))
        )
        return ModelDrafter.over(target, draft, own)
    except BaseException:
        if own is not None:
            own.close()
        draft.close()
        raise


def _brought(root: Path, base: str) -> Path | None:
    """A draft head for this model that a fleet has brought and that was confirmed. base: its sha256, hex."""
    from lichen.sync.manifest import CheckpointManifest
    from lichen.sync.updates.slots import Slots

    slots = Slots(root)
    for slot in slots.mendable().values():
        version = slot.active
        if version is None or not slot.confirmed or not isinstance(version.manifest, CheckpointManifest):
            continue
        if version.manifest.use == "draft_head" and version.manifest.base == base and slots.whole(version):
            return slots.blob(version.sha256)
    return None
