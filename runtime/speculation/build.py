"""From the settings to drafters: which ones a model gets, and what they need."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import msgspec

from lichen.errors import ConfigError
from lichen.runtime.native import Context, ContextSize, Model
from lichen.runtime.speculation.answers import AnswerMemories
from lichen.runtime.speculation.drafter import Drafter
from lichen.runtime.speculation.model import CATCH_UP, ModelDrafter
from lichen.runtime.speculation.plan import Speculation
from lichen.runtime.speculation.suffix import SuffixDrafter

log = logging.getLogger("lichen.speculation")

EXTRA_OUTPUTS = 32  # drafted tokens of all sequences in one step
Choice = Literal["auto", "off", "suffix", "model"]


class SpeculationOptions(msgspec.Struct, frozen=True, kw_only=True):
    """drafters: which ones; auto is suffix, and model where there is one. draft_model: a GGUF file.
    answers_folder: where past answers are remembered, at most `answers_limit` bytes; None for nowhere."""

    drafters: Choice = "off"
    draft_model: Path | None = None
    answers_folder: Path | None = None
    answers_limit: int = 0

    @property
    def extra_outputs(self) -> int:
        """Logits that a step needs beyond one a slot."""
        return 0 if self.drafters == "off" else EXTRA_OUTPUTS

    @property
    def thinks(self) -> bool:
        """Whether a draft model is loaded."""
        return self.drafters == "model" or (self.drafters == "auto" and self.draft_model is not None)


def build(
    model: Model, context: Context, options: SpeculationOptions, *, identity: str, threads: int
) -> Speculation:
    """The speculation of a context. identity: of the model, for what is remembered.

    Raises ConfigError, ModelFileError or EngineError for a draft model that cannot be used.
    """
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
    return Speculation(drafters, width=context.batch, outputs=context.outputs, context=context.context)


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
