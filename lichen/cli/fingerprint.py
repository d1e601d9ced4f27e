"""`lichen fingerprint`: how fast a model is on this machine, from a few seconds on a few of its layers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from lichen.cli.inspect import AsJson
from lichen.cli.settings import config_of, megabytes, table
from lichen.cli.texts import Stages, interruptible, model_path
from lichen.errors import ConfigError
from lichen.sync.download import hash_file

if TYPE_CHECKING:
    from lichen.devices.curves import Fingerprint

_DIGEST = re.compile(r"[0-9a-f]{64}")
_CONTEXT = 1024  # tokens that a row of the table has behind it

Layouts = Annotated[
    str,
    typer.Option(
        "--layouts",
        metavar="NAMES",
        help="'source' for the file as it is, and types to store it as, such as q8_0,f16.",
    ),
]
Again = Annotated[bool, typer.Option("--again", help="Forget what was measured before.")]
Seconds = Annotated[float, typer.Option(min=0, max=3600, help="To measure each layout, after a first round.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(fingerprint)


def fingerprint(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="GGUF file, or a model in the store.")],
    layouts: Layouts = "source",
    seconds: Seconds = 5.0,
    again: Again = False,
    as_json: AsJson = False,
) -> None:
    """Measure how fast a model is here, on a few layers.

    It takes some seconds a layout, and is kept. Ctrl-C keeps what was measured so far.
    """
    path, home = model_path(context, model), config_of(context).home
    names = layout_names(layouts)
    digest = digest_of(path)
    with interruptible(), Stages() as stages:
        found = [_take(path, digest, home, name, seconds, again, stages) for name in names]
    if as_json:
        typer.echo(json.dumps([msgspec.to_builtins(one) for one in found], indent=2))
        return
    table(
        "",
        ("LAYOUT", "THREADS", "TOK/S", "TOK/S x 4", "TOK/S x 16", "PROMPT/S", "KV", "LOAD", "MEMORY"),
        rows(found),
    )
    typer.echo(
        f"Tokens a second of 1, 4 and 16 streams, each behind {_CONTEXT:,} tokens, and of a prompt of 512 "
        "tokens. KV: bytes of 1,000 tokens. MEMORY: without KV."
    )


def layout_names(text: str) -> list[str]:
    """Names of layouts, as they are kept. Raises ConfigError that lists what there is."""
    from lichen.quant.choice import type_named
    from lichen.runtime.measuring import SOURCE

    parts = [part.strip().lower() for part in text.split(",")]
    return [part if part == SOURCE else type_named(part).name.lower() for part in dict.fromkeys(parts)]


def digest_of(path: Path) -> str:
    """The sha256 of a file; the store has it in the name."""
    return path.name if _DIGEST.fullmatch(path.name) else hash_file(path)


def _take(
    path: Path, digest: str, home: Path, layout: str, seconds: float, again: bool, stages: Stages
) -> Fingerprint:
    from lichen.devices.schedule import Progress
    from lichen.runtime.fingerprints import take_fingerprint

    def tell(now: Progress) -> None:
        stages(f"measuring {layout}", now.done, now.total, now.task.kind if now.task is not None else "")

    stages(f"preparing {layout}", 0, 1)
    found = take_fingerprint(path, digest, home, layout=layout, again=again, budget_s=seconds, progress=tell)
    if found is None:
        raise ConfigError(f"Measuring {layout} was stopped before it was complete.")
    return found


def rows(found: list[Fingerprint]) -> Iterator[tuple[Any, ...]]:
    """A line for each layout and number of threads."""
    for one in found:
        memory = one.weight_bytes + one.fixed_bytes + one.compute.at(512)
        cell = next(cost.cell_bytes for cost in one.kv if cost.type == "f16")
        for curve in one.threads:
            rates = [
                n / one.seconds(n, threads=curve.threads, rows=n, alone=n * _CONTEXT) for n in (1, 4, 16)
            ]
            prompt = 512 / one.seconds(512, threads=curve.threads, attended=512 * 256)
            yield (
                *(one.layout, curve.threads, *(f"{rate:.0f}" for rate in (*rates, prompt))),
                *(megabytes(1000 * cell), f"{one.load_seconds:.2f} s", megabytes(memory)),
            )
