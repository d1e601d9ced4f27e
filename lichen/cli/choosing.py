"""How `lichen quantize` comes by the type of every tensor: one for all, or by measuring under a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lichen.cli.texts import Stages, read_texts, tokens_of
from lichen.errors import ConfigError, ModelFileError
from lichen.sync.download import hash_file

if TYPE_CHECKING:
    from lichen.models.decoder import Decoder
    from lichen.quant.formats import GGMLType
    from lichen.quant.gguf import GGUFFile
    from lichen.quant.importance import Importance

WINDOW = 512  # tokens of one stretch of calibration text
MEASURED_WINDOW = 128  # of one stretch that sensitivities are measured on


class Request(NamedTuple):
    """What the options ask for, checked. budget: bytes of the whole file."""

    kind: GGMLType | None
    budget: int | None
    kinds: Sequence[GGMLType] | None
    calibration: Sequence[Path]
    importance: Path | None
    tokens: int
    measured_tokens: int
    span: int


class Chosen(NamedTuple):
    """What each tensor becomes, and how that came about."""

    types: Mapping[str, GGMLType]
    importance: Importance | None
    notes: list[str]
    measured: dict[str, float]


def choose(path: Path, file: GGUFFile, request: Request, folder: Path, stages: Stages) -> Chosen:
    """The type of every tensor. folder: where measurements are kept, so that a second run goes on.

    Raises ConfigError for a budget that is too small, and what reading the texts and files raises.
    """
    from lichen.quant.importance import load_importance

    notes: list[str] = []
    importance = load_importance(request.importance) if request.importance is not None else None
    if not request.calibration:
        assert request.kind is not None
        return _plain(file, request.kind, importance, notes)
    tokens = tokens_of(path, read_texts(request.calibration))
    model = _runnable(file, notes)
    if model is None:
        return _plain(file, request.kind or _largest_within(file, request), importance, notes)
    if request.budget is not None:
        from lichen.models.mixture import KINDS, check_budget

        check_budget(file, request.kinds or KINDS, request.budget)  # before minutes of measuring
    key = hash_file(path)
    if importance is None:
        importance = _gathered(model, key, tokens, request, folder, stages)
    if request.kind is not None:
        return _plain(file, request.kind, importance, notes)
    return _measured(model, key, tokens, importance, request, folder, stages)


def _runnable(file: GGUFFile, notes: list[str]) -> Decoder | None:
    """The model for torch, or None and a note why there is none."""
    try:
        from lichen.models.load import build_model

        return build_model(file)
    except ImportError:
        why = "torch is not installed (pip install 'lichen[train]')"
    except ModelFileError as error:
        why = error.message.rstrip(".")
    notes.append(f"Quantized without measuring or importance: {why}.")
    return None


def _gathered(
    model: Decoder, key: str, tokens: Sequence[int], request: Request, folder: Path, stages: Stages
) -> Importance:
    """The importance matrix over the text, from an earlier run where there was one."""
    from lichen.models.calibrate import gather_importance
    from lichen.quant.importance import load_importance, save_importance
    from lichen.quant.ledger import digest
    from lichen.runtime.scoring import stretches

    window = min(WINDOW, len(tokens))
    windows = stretches(tokens, window, max(1, request.tokens // window))
    path = folder / f"{digest(key, str(windows))}.importance.gguf"
    if path.is_file():
        return load_importance(path)
    importance = gather_importance(
        model,
        windows,
        progress=lambda done, of: stages("importance", done, of, "tokens"),
        text=", ".join(text.name for text in request.calibration),
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_importance(importance, path)
    return importance


def _measured(
    model: Decoder,
    key: str,
    tokens: Sequence[int],
    importance: Importance,
    request: Request,
    folder: Path,
    stages: Stages,
) -> Chosen:
    from lichen.models.mixture import KINDS, Mixer
    from lichen.models.sensitivity import Measure
    from lichen.quant.choice import is_matrix
    from lichen.quant.formats import GGMLType
    from lichen.quant.ledger import Ledger, digest
    from lichen.runtime.scoring import stretches

    assert request.budget is not None
    window = min(MEASURED_WINDOW, len(tokens))
    windows = stretches(tokens, window, max(1, request.measured_tokens // window))
    facts = b"".join(importance[name].tobytes() for name in sorted(importance))
    ledger = Ledger(folder, digest(key, str(windows), facts))
    stages("reference", 0, 1)
    measure = Measure(model, windows)
    kinds = request.kinds or KINDS
    mixer = Mixer(model.file, measure, importance, kinds=kinds, span=request.span, ledger=ledger, tell=stages)
    mixture = mixer.choose(request.budget, mixer.ratings())
    whole = [
        name
        for name, kind in mixture.types.items()
        if kind is GGMLType.F16 and kind not in kinds and is_matrix(model.file.tensors[name])
    ]
    notes = (
        [f"{len(whole)} tensors fit none of the types and became F16, such as {whole[0]}."] if whole else []
    )
    numbers = {"kl_predicted": mixture.predicted, "kl_measured": mixture.measured}
    return Chosen(mixture.types, importance, notes, numbers)


def _plain(file: GGUFFile, kind: GGMLType, importance: Importance | None, notes: list[str]) -> Chosen:
    from lichen.quant.choice import plan_for

    plan = plan_for(file.tensors.values(), kind)
    if plan.stand_ins:
        others = sorted({plan.types[name].name for name in plan.stand_ins})
        notes.append(
            f"{len(plan.stand_ins)} tensors have rows that are no multiple of {kind.name}'s block "
            f"and became {', '.join(others)}, such as {next(iter(plan.stand_ins))}."
        )
    return Chosen(plan.types, importance, notes, {})


def _largest_within(file: GGUFFile, request: Request) -> GGMLType:
    """The one type with most bits that keeps within the budget. Raises ConfigError when none does."""
    from lichen.quant import ggml
    from lichen.quant.choice import FILE_TYPES, bits, plan_for
    from lichen.quant.quantize import header_bytes, planned_bytes

    assert request.budget is not None
    room = request.budget - header_bytes(file)
    sizes = {
        kind: planned_bytes(file, plan_for(file.tensors.values(), kind).types)
        for kind in request.kinds or FILE_TYPES
        if kind not in ggml.NEEDS_IMPORTANCE
    }
    within = [kind for kind, size in sizes.items() if size <= room]
    if not within:
        raise ConfigError(
            f"A budget of {request.budget:,} bytes is too small: the smallest possible is "
            f"{min(sizes.values()) + header_bytes(file):,}."
        )
    return max(within, key=bits)
