"""Texts that commands read, as tokens of a model, and progress bars of work that takes minutes."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import typer

from lichen.cli.settings import config_of
from lichen.errors import ConfigError, NotFound, RequestError

MAX_TEXT = 1 << 28  # bytes of a text


def model_path(context: typer.Context, reference: str) -> Path:
    """The file of a path or of a model in the store. Raises NotFound; nothing is downloaded."""
    from lichen.api import local_file
    from lichen.sync.store import Store

    path = local_file(reference)
    if path is not None:
        return path
    if reference.endswith(".gguf") or "/" in reference:
        raise NotFound(f"There is no file {reference}.")
    config = config_of(context)
    store = Store(config.home / "store", offline=True)
    manifest = store.resolve(reference)
    if manifest is None:
        raise NotFound(f"The model {reference!r} is not here.", hint=f"Get it first: lichen pull {reference}")
    return store.blob_path(manifest)


def read_texts(paths: Sequence[Path]) -> str:
    """The files' texts, one after the other. Raises ConfigError for one that is no text."""
    parts = []
    for path in paths:
        try:
            if path.stat().st_size > MAX_TEXT:
                raise ConfigError(f"{path} is larger than {MAX_TEXT >> 20} MB: take a part of it.")
            parts.append(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not a text in UTF-8.") from error
    return "\n\n".join(parts)


def tokens_of(model: Path, text: str) -> list[int]:
    """Tokens of a text in a model's vocabulary. Raises ModelFileError, RequestError for none."""
    from lichen.quant.gguf_check import check_gguf
    from lichen.runtime import native

    check_gguf(model)
    loaded = native.Model(model)
    try:
        tokens = loaded.tokenize(text, special=False, add_bos=False)
    finally:
        loaded.close()
    if not tokens:
        raise RequestError("The text is empty.")
    return tokens


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does, so that what is half done is removed."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Stages:
    """Progress: a bar with the time left on a terminal, elsewhere a line a stage."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._stage = ""

    def __enter__(self) -> Stages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Show one report."""
        new = stage != self._stage
        self._stage = stage
        if not sys.stderr.isatty():
            if new:
                print(f"{stage}…", file=sys.stderr, flush=True)
            return
        if self._bar is None:
            self._start()
        if new:
            self._bar.reset(self._task, total=total)
        self._bar.update(self._task, description=stage, completed=done, total=total, detail=detail)

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description:20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=Console(file=sys.stderr),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, detail="")
        self._bar.start()
