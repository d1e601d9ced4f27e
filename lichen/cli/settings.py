"""The settings that commands share: flags given so far, and the configuration that follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import typer

from lichen.config import Config, Effective, load

PIPE_COLUMNS = 240


class Given:
    """Flags given before the command; `effective` adds those after it."""

    def __init__(self, flags: Mapping[str, object]) -> None:
        self._flags = dict(flags)

    def effective(self, **flags: object) -> Effective:
        """The configuration with these flags; a None was not given. Raises ConfigError."""
        merged = {**self._flags, **{name: value for name, value in flags.items() if value is not None}}
        return load(merged)


def config_of(command: typer.Context, /, **flags: object) -> Config:
    """The configuration in force for a command."""
    given: Given = command.obj
    return given.effective(**flags).config


def complete_model(incomplete: str) -> Iterable[str]:
    """Shell completion for a model: names in the store and in the catalog."""
    from lichen.sync.catalog import CATALOG
    from lichen.sync.store import Store

    try:
        names = {manifest.name for manifest in Store(load().config.home / "store").manifests()}
    except Exception:  # completion never disturbs the shell
        names = set()
    return sorted(name for name in names | CATALOG.keys() if name.startswith(incomplete))


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a table: as wide as a terminal is, and as wide as it needs to be in a pipe or a file."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console.width = PIPE_COLUMNS
    console.print(drawn)


def megabytes(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
