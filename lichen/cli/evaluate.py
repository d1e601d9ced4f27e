"""`lichen eval`: perplexity of a model on a text, and its divergence from a reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from lichen.cli.settings import config_of, table
from lichen.cli.texts import Stages, model_path, read_texts, tokens_of
from lichen.errors import LichenError, RequestError

if TYPE_CHECKING:
    from lichen.quant.divergence import Logits


class Scorer(Protocol):
    """What computes logits."""

    def logits(self, tokens: Sequence[int]) -> Logits:
        """float32 [tokens, vocabulary] of one stretch of text."""

    def close(self) -> None:
        """Give the memory back."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eval")(evaluate)


def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="GGUF file, or a model in the store.")],
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="Text in UTF-8 to score.")],
    reference: Annotated[
        str | None, typer.Option(help="Model to compare with, such as the unquantized one.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of the text to use.")] = 8192,
    window: Annotated[int, typer.Option(min=16, max=8192, help="Tokens of one stretch.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a text: perplexity, and with a reference the KL divergence, by the engine and by torch.

    Each stretch of text is scored on its own, from its second token on.
    """
    from lichen.runtime.scoring import stretches

    path = model_path(context, model)
    other = None if reference is None else model_path(context, reference)
    parts = stretches(tokens_of(path, read_texts([text])), window, max(1, tokens // window))
    with Stages() as stages:
        results = evaluate_file(path, parts, other, threads=threads_of(context), stages=stages)
    if as_json:
        typer.echo(json.dumps({"model": path.name, "reference": reference, **results}, indent=2))
        return
    names = {"perplexity": "perplexity", "kl": "KL, nats a token", "same_top": "same likeliest token"}
    rows = [
        (shown, *(_cell(result, key) for result in results.values()))
        for key, shown in names.items()
        if any(key in result for result in results.values())
    ]
    table("", ("", *results), rows)
    for by, result in results.items():
        if "problem" in result:
            typer.echo(f"{by}: {result['problem']}")


def _cell(result: dict[str, Any], key: str) -> str:
    if key not in result:
        return ""
    if key == "same_top":
        return f"{result[key]:.2%}"
    return f"{result[key]:.5g} ± {result[f'{key}_error']:.2g}"


def threads_of(context: typer.Context) -> int:
    """Threads that the configuration gives a model."""
    from lichen.api import model_options

    return model_options(config_of(context)).threads


def evaluate_file(
    path: Path,
    parts: Sequence[Sequence[int]],
    reference: Path | None,
    *,
    threads: int,
    stages: Callable[[str, int, int], None],
    torch: bool = True,
) -> dict[str, dict[str, Any]]:
    """Results by "engine" and, where it can, by "torch"; a `problem` in place of numbers where not."""
    from lichen.runtime.scoring import NativeScorer

    window = max(map(len, parts))

    def engine(file: Path) -> Scorer:
        return NativeScorer(file, window=window, threads=threads)

    results = {"engine": _score(engine, path, reference, parts, lambda at: stages("engine", at, len(parts)))}
    if not torch:
        return results
    try:
        results["torch"] = _score(
            torch_scorer(), path, reference, parts, lambda at: stages("torch", at, len(parts))
        )
    except LichenError as error:
        results["torch"] = {"problem": str(error)}
    return results


def torch_scorer() -> Callable[[Path], Scorer]:
    """Makes scorers. Raises RequestError when torch is not installed."""
    try:
        from lichen.models.scoring import TorchScorer
    except ImportError as error:
        raise RequestError(
            "Torch is not installed.", hint="Install it with: pip install 'lichen[train]'"
        ) from error
    return TorchScorer


def _score(
    make: Callable[[Path], Scorer],
    path: Path,
    reference: Path | None,
    parts: Sequence[Sequence[int]],
    tell: Callable[[int], None],
) -> dict[str, Any]:
    from lichen.quant.divergence import Tally

    tally = Tally()
    scorer = make(path)
    other = None
    try:
        other = make(reference) if reference is not None else None
        for index, part in enumerate(parts):
            tell(index)
            expected = other.logits(part)[:-1] if other is not None else None
            logits = scorer.logits(part)[:-1]
            if expected is not None and expected.shape != logits.shape:
                raise RequestError(
                    f"The models have vocabularies of {logits.shape[1]} and {expected.shape[1]} tokens.",
                    hint="A reference must be the same model in another form.",
                )
            tally.add(logits, part[1:], expected)
        tell(len(parts))
    finally:
        scorer.close()
        if other is not None:
            other.close()
    return tally.result()
