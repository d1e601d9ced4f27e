"""`lichen feedback`: what was said of answers; the daemon may run meanwhile or not."""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from lichen.cli.settings import config_of, table
from lichen.errors import JournalError, NotFound, RequestError

if TYPE_CHECKING:
    from lichen.adapters.journal import Journal
    from lichen.adapters.records import Record

EMPTY = "There is no feedback yet; docs/guides/feedback.md says how to give some."

feedback = typer.Typer(
    help="What was said of answers, and what was kept of them.", no_args_is_help=True, rich_markup_mode=None
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(feedback, name="feedback")


@contextmanager
def _journal(context: typer.Context) -> Iterator[Journal | None]:
    """The journal of the home, or None where nothing was ever kept; looking makes no file."""
    from lichen.adapters.journal import Journal

    config = config_of(context)
    path = config.home / "learning" / "journal.db"
    if not path.exists():
        yield None
        return
    with closing(Journal.open(path, limit=config.journal_limit)) as journal:
        yield journal


@feedback.command("list")
def list_feedback(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many, the newest first.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List what was kept and what was said of it, without the texts."""
    with _journal(context) as journal:
        entries = [] if journal is None else journal.entries(limit=limit)
        total, rated = (0, 0) if journal is None else journal.count()
    if as_json:
        import msgspec

        typer.echo(json.dumps(msgspec.to_builtins(entries), indent=2))
        return
    if not total:
        typer.echo(EMPTY)
        return
    rows = [
        (
            entry.id,
            _when(entry.created),
            entry.owner or "-",
            entry.model,
            entry.rating or "-",
            "yes" if entry.corrected else "",
            " ".join(entry.tags),
        )
        for entry in entries
    ]
    table("", ("ID", "WHEN", "KEY", "MODEL", "RATING", "CORRECTED", "TAGS"), rows)
    typer.echo(f"{total:,} kept, {rated:,} of them rated or corrected.")


@feedback.command()
def show(
    context: typer.Context,
    id: Annotated[str, typer.Argument(help="Id of a record.")],
    as_json: AsJson = False,
) -> None:
    """Show one record with its texts."""
    with _journal(context) as journal:
        if journal is None:
            raise NotFound(f"There is no record {id!r}.", hint=EMPTY)
        record = journal.get(id)
    if as_json:
        import msgspec

        typer.echo(json.dumps(msgspec.to_builtins(record), indent=2))
        return
    for line in _lines(record):
        typer.echo(line)


@feedback.command()
def export(
    context: typer.Context,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; standard output otherwise.")
    ] = None,
    form: Annotated[
        str,
        typer.Option(help="chat: good answers and corrections. preference: answers and better ones."),
    ] = "chat",
) -> None:
    """Write what can be learned from as JSON lines, in the form of OpenAI's fine-tuning files."""
    import msgspec

    from lichen.adapters.export import line_of

    if form not in ("chat", "preference"):
        raise RequestError(f"--form is {form!r}; it must be chat or preference.")
    written = left = 0
    with _journal(context) as journal, _output(output) as stream:
        for record in () if journal is None else journal.records():
            line = line_of(record, "chat" if form == "chat" else "preference")
            if line is None:
                left += 1
                continue
            stream.write(msgspec.json.encode(line) + b"\n")
            written += 1
        stream.flush()
    typer.echo(f"{written:,} lessons; {left:,} records teach nothing in this form.", err=True)


@feedback.command()
def forget(
    context: typer.Context,
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of records or of responses.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Delete everything.")] = False,
    before: Annotated[
        datetime.datetime | None, typer.Option(help="Delete what was kept before this day.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete records for good; adapters that learned from them are marked as tainted."""
    if bool(ids) + everything + (before is not None) != 1:
        raise RequestError("Give ids, or --all, or --before DATE.")
    with _journal(context) as journal:
        if journal is None:
            typer.echo(EMPTY)
            return
        if not ids:
            ids = journal.all_ids(before=None if before is None else before.timestamp())
            if not yes:
                typer.confirm(f"Delete {len(ids):,} records for good?", abort=True)
        with journal.writing():
            gone = journal.forget(ids)
        journal.scrub()
    if gone.adapters:
        from lichen.adapters.registry import Registry

        Registry(config_of(context).home / "adapters").taint(gone.adapters)
    typer.echo(f"Deleted {len(gone.ids):,} records; nothing of them is left in the journal's files.")
    for adapter in gone.adapters:
        typer.echo(f"The adapter {adapter} had learned from them and is tainted now.", err=True)


def _output(path: Path | None) -> Any:
    """Where lines go: a file that only its owner reads, or standard output."""
    if path is None:
        return nullcontext(sys.stdout.buffer)
    try:
        stream: BinaryIO = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")
    except OSError as error:
        raise JournalError(f"The file {path} cannot be written: {error.strerror}.") from error
    return stream


def _lines(record: Record) -> Iterator[str]:
    yield f"{record.id}  {_when(record.created)}  {record.model}  {record.response} choice {record.choice}"
    for message in record.request.get("messages", ()):
        yield f"{message['role']}: {_plain(message.get('content') or message.get('tool_calls'))}"
    if "prompt" in record.request:
        yield f"prompt: {_plain(record.request['prompt'])}"
    answer = record.answer
    yield f"answer: {_plain(answer.get('text', answer.get('content')) or answer.get('tool_calls'))}"
    if record.correction is not None:
        yield f"correction: {_plain(record.correction)}"
    yield f"rating: {record.rating or '-'}  tags: {' '.join(record.tags) or '-'}"


def _plain(value: object) -> str:
    """A text for the terminal; what came from a client must not steer it."""
    from lichen.cli.answer import for_screen

    return for_screen(value if isinstance(value, str) else json.dumps(value))


def _when(moment: float) -> str:
    return datetime.datetime.fromtimestamp(moment).isoformat(" ", "minutes")
