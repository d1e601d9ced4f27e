"""`lichen mixture`: mixtures of data that a fleet or a file describes, shown and made into lessons."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lichen.cli.settings import config_of, megabytes, table
from lichen.errors import FleetError, OfflineError

if TYPE_CHECKING:
    from lichen.sync.mixture import Mixture

mixture = typer.Typer(help="Mixtures of data to learn from.", no_args_is_help=True, rich_markup_mode=None)
Which = Annotated[str, typer.Argument(metavar="MIXTURE", help="A file, or fleet:NAME.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(mixture, name="mixture")


@mixture.command()
def show(context: typer.Context, which: Which) -> None:
    """List a mixture's sources: share, size, licence, hash and address."""
    found = _read(context, which)
    total = sum(source.weight for source in found.sources)
    rows = (
        (
            f"{source.weight / total:.1%}",
            megabytes(source.size),
            source.licence,
            source.sha256[:12],
            source.url,
        )
        for source in found.sources
    )
    table("", ("SHARE", "SIZE", "LICENCE", "SHA256", "SOURCE"), rows)
    typer.echo(f"{found.lines:,} lines." if found.lines else "Every line of every source once.")


@mixture.command()
def materialize(
    context: typer.Context,
    which: Which,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="PATH", help="File of JSON lines.")],
) -> None:
    """Fetch a mixture's sources, check their hashes, and write its lines."""
    from lichen.sync.mixture import materialize as write

    config, found = config_of(context), _read(context, which)
    if config.offline and any(source.url.startswith("https:") for source in found.sources):
        raise OfflineError("Offline mode is on, and a source of the mixture is remote.")
    count = asyncio.run(write(found, config.home / "mixtures", output))
    typer.echo(f"Wrote {count:,} lines to {output}.")


def _read(context: typer.Context, which: str) -> Mixture:
    from lichen.sync.mixture import LIMIT, read_mixture
    from lichen.sync.store import FLEET, Store

    path = Path(which)
    if which.startswith(FLEET):
        store = Store(config_of(context).home / "store")
        path = store.blob(store.slots.serving(f"mixtures/{which.removeprefix(FLEET)}").sha256)
    try:
        with path.open("rb") as file:
            return read_mixture(file.read(LIMIT + 1))
    except OSError as error:
        raise FleetError(f"{path} cannot be read: {error.strerror}.") from error
