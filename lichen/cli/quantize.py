"""`lichen quantize`: store a model in fewer bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lichen.cli.choosing import MEASURED_WINDOW, WINDOW, Chosen, Request, choose
from lichen.cli.settings import config_of, megabytes, table
from lichen.cli.texts import Stages, interruptible, model_path, read_texts, tokens_of
from lichen.errors import ConfigError
from lichen.sync.download import hash_file

if TYPE_CHECKING:
    from lichen.quant.gguf import GGUFFile
    from lichen.quant.quantize import QuantizeProgress


# options, by what they ask for
OneType = Annotated[str | None, typer.Option("--type", help="One type for all matrices, such as q4_k.")]
Size = Annotated[
    str | None, typer.Option(help="Budget for the file, such as 90MB: types are chosen by measurement.")
]
Calibration = Annotated[
    list[Path] | None, typer.Option(metavar="FILE", help="Text to calibrate with; may be repeated.")
]
ImportanceFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Importance matrix in GGUF, as of llama-imatrix.")
]
SavedImportance = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Keep the importance matrix that is gathered.")
]
Types = Annotated[str | None, typer.Option(help="Types that a budget may choose from, separated by commas.")]
Span = Annotated[
    int, typer.Option(min=1, help="Layers that share a measurement: more is faster and coarser.")
]
MeasuredTokens = Annotated[int, typer.Option(min=64, help="Tokens that sensitivities are measured on.")]
HeldOut = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Text to compare the result with the source on.")
]
Picture = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Picture of bits by layer (.svg or .png).")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(quantize)


def quantize(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="GGUF file, or a model in the store.")],
    target: Annotated[Path, typer.Argument(help="File to write.")],
    type: OneType = None,
    size: Size = None,
    bits: Annotated[float | None, typer.Option(help="The same budget, in bits a weight.")] = None,
    calibration: Calibration = None,
    importance: ImportanceFile = None,
    save_importance: SavedImportance = None,
    types: Types = None,
    tokens: Annotated[int, typer.Option(min=512, help="Tokens of calibration text.")] = 64 * WINDOW,
    span: Span = 1,
    measure_tokens: MeasuredTokens = 4 * MEASURED_WINDOW,
    evaluate: HeldOut = None,
    picture: Picture = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Store a model in fewer bytes: as one type, or under a budget with a measured type for each tensor."""
    from lichen.cli.bits_picture import bars, draw
    from lichen.quant.gguf import open_gguf
    from lichen.quant.importance import save_importance as save
    from lichen.quant.quantize import check_target

    path = model_path(context, source)
    with interruptible(), open_gguf(path) as file, Stages() as stages:
        request = _request(
            file, type, size, bits, types, calibration or [], importance, tokens, measure_tokens, span
        )
        check_target(file, target)  # before minutes of measuring
        folder = config_of(context).home / "measurements"
        chosen = choose(path, file, request, folder, stages)
        if save_importance is not None:
            if chosen.importance is None:
                raise ConfigError("There is no importance matrix to save.", hint="Give --calibration.")
            save(chosen.importance, save_importance)
        write(path, file, target, chosen, stages)
        record = _record(path, file, target, chosen)
        if evaluate is not None:
            record["evaluation"] = _evaluation(context, path, target, evaluate, stages)
        if picture is not None:
            chosen.notes.extend(draw(file, chosen.types, picture))
        drawn = "" if as_json else bars(file, chosen.types)
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    else:
        _show(record, drawn)


# ---- what is asked for ----------------------------------------------------------------------------


def _request(
    file: GGUFFile,
    type: str | None,
    size: str | None,
    bits: float | None,
    types: str | None,
    calibration: Sequence[Path],
    importance: Path | None,
    tokens: int,
    measured_tokens: int,
    span: int,
) -> Request:
    from lichen.quant.choice import type_named
    from lichen.quant.quantize import header_bytes

    if sum(option is not None for option in (type, size, bits)) != 1:
        raise ConfigError(
            "Say what the file shall become with exactly one of --type, --size and --bits.",
            hint="For example: --type q4_k, or --size 90MB --calibration text.txt.",
        )
    if type is None and not calibration:
        raise ConfigError(
            "A budget needs a text to measure with.", hint="Give --calibration FILE, a text of your own kind."
        )
    budget = None if size is None else size_of(size)
    if bits is not None:
        if not 0 < bits <= 32:
            raise ConfigError(f"--bits is {bits:g}, but must be above 0 and at most 32.")
        weights = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
        budget = int(weights * bits / 8) + header_bytes(file)
    kinds = None if types is None else [type_named(name) for name in types.split(",")]
    kind = None if type is None else type_named(type)
    return Request(kind, budget, kinds, calibration, importance, tokens, measured_tokens, span)


def size_of(text: str) -> int:
    """Bytes of a size such as 90MB, 1.5GiB or 90000000. Raises ConfigError."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20}
    units["GIB"] = 1 << 30
    number = text.strip().rstrip("BbGgIiKkMm ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        count = float(number) * units[unit]
        if not 0 < count < 1 << 60:
            raise ValueError
    except (ValueError, KeyError):
        raise ConfigError(f"--size is {text!r}, not a size such as 90MB or 1.5GiB.") from None
    return int(count)


# ---- writing and telling --------------------------------------------------------------------------


def write(path: Path, file: GGUFFile, target: Path, chosen: Chosen, stages: Stages) -> None:
    """Write the file, with where it came from."""
    from lichen.quant.quantize import quantize_file

    def tell(now: QuantizeProgress) -> None:
        done = f"tensor {now.tensors_done} of {now.tensors}, {megabytes(now.bytes_done)}"
        stages("writing", now.bytes_done, now.bytes, done)

    lineage: dict[str, Any] = {"lichen.source.sha256": hash_file(path), "lichen.source.file": path.name}
    if chosen.importance is not None:
        lineage |= {
            "quantize.imatrix.dataset": chosen.importance.text,
            "quantize.imatrix.entries_count": len(chosen.importance),
        }
    quantize_file(file, target, chosen.types, importance=chosen.importance, lineage=lineage, progress=tell)


def _record(path: Path, file: GGUFFile, target: Path, chosen: Chosen) -> dict[str, Any]:
    from lichen.quant.choice import is_matrix

    weights = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
    held: dict[str, int] = {}
    for name, kind in chosen.types.items():
        if is_matrix(file.tensors[name]):
            held[kind.name] = held.get(kind.name, 0) + math.prod(file.tensors[name].shape)
    return {
        "source": path.name,
        "target": str(target),
        "bytes_before": sum(part.stat().st_size for part in file.parts),
        "bytes": target.stat().st_size,
        "bits": 8 * target.stat().st_size / weights,
        "weights_by_type": held,
        "types": {name: kind.name for name, kind in chosen.types.items()},
        "notes": chosen.notes,
        **chosen.measured,
    }


def _evaluation(
    context: typer.Context, path: Path, target: Path, text: Path, stages: Stages
) -> dict[str, Any]:
    """Perplexity, KL and speed of both on a text, by the engine that serves them."""
    from lichen.cli.evaluate import evaluate_file, threads_of
    from lichen.runtime.scoring import NativeScorer, stretches

    parts = stretches(tokens_of(path, read_texts([text])), WINDOW, 8)
    found = {}
    for name, file in (("source", path), ("result", target)):
        other = path if name == "result" else None
        scores = evaluate_file(file, parts, other, threads=threads_of(context), stages=stages, torch=False)[
            "engine"
        ]
        scorer = NativeScorer(file, window=WINDOW, threads=threads_of(context))
        try:
            scores["prompt_tokens_s"], scores["tokens_s"] = scorer.speed(parts[0])
        finally:
            scorer.close()
        found[name] = scores
    return found


def _show(record: dict[str, Any], drawn: str) -> None:
    sizes = {"source": record["bytes_before"], "result": record["bytes"]}
    scores = record.get("evaluation", {})
    keys = ("perplexity", "kl", "prompt_tokens_s", "tokens_s") if scores else ()
    rows = []
    for name, size in sizes.items():
        found = scores.get(name, {})
        rows.append((name, megabytes(size), *(f"{found[key]:.4g}" if key in found else "" for key in keys)))
    table("", ("", "SIZE", "PERPLEXITY", "KL", "PROMPT TOKENS/S", "TOKENS/S")[: 2 + len(keys)], rows)
    typer.echo(drawn)
    if "kl_measured" in record:
        typer.echo(
            f"KL on the calibration text: {record['kl_measured']:.4g} nats a token "
            f"({record['kl_predicted']:.4g} expected from single tensors)."
        )
    for note in record["notes"]:
        typer.echo(note)
