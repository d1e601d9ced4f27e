"""`lichen keys`: the API keys that clients of the daemon send."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from lichen.cli.settings import config_of, table

if TYPE_CHECKING:
    from lichen.runtime.http.keys import KeyStore

keys = typer.Typer(
    help="API keys that clients of the daemon send.", no_args_is_help=True, rich_markup_mode=None
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(keys, name="keys")


def _store(context: typer.Context) -> KeyStore:
    from lichen.runtime.http.keys import KeyStore

    return KeyStore(config_of(context).home / "keys.json")


@keys.command()
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Who or what will use the key, such as 'laptop'.")],
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the answers to its requests in the journal.")
    ] = False,
) -> None:
    """Make a key and print it, once; a running daemon asks for keys from now on."""
    typer.echo(_store(context).create(name, keeps=keep))
    typer.echo("Keep it now: it is stored as a hash and cannot be shown again.", err=True)


@keys.command("list")
def list_keys(
    context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """List the keys, without what they are."""
    found = _store(context).list()
    if as_json:
        fields = ("id", "name", "created", "ending", "revoked", "keeps")
        typer.echo(json.dumps([{field: getattr(key, field) for field in fields} for key in found], indent=2))
    elif not found:
        typer.echo("There are no keys. Make one: lichen keys create NAME")
    else:
        rows = [
            (
                key.id,
                key.name,
                key.created,
                f"…{key.ending}",
                "revoked" if key.revoked else "active",
                "all" if key.keeps else "",
            )
            for key in found
        ]
        table("", ("ID", "NAME", "CREATED", "KEY", "STATE", "KEEPS"), rows)


@keys.command()
def revoke(
    context: typer.Context, name: Annotated[str, typer.Argument(help="Id or name of the key.")]
) -> None:
    """Make a key worthless; a running daemon refuses it within a second."""
    key = _store(context).revoke(name)
    typer.echo(f"Revoked {key.name} ({key.id}).")
