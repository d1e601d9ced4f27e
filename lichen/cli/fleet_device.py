"""`lichen fleet pull|state|cancel`, `lichen export`, `lichen import`: a machine that belongs to a fleet."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, List, Optional

import typer

import lichen
from lichen.cli.fleet import AsJson, _device, _show, fleet
from lichen.cli.settings import config_of, table
from lichen.errors import FleetError, OfflineError, SourceError

if TYPE_CHECKING:
    from lichen.sync.meter import FetchProgress
    from lichen.sync.trust.member import Member
    from lichen.sync.updates.states import Update
    from lichen.sync.updates.updater import Outcome

Folder = Annotated[Path, typer.Argument(metavar="PATH", help="A folder, such as a USB stick's.")]


def register(app: typer.Typer) -> None:
    """Add the commands that are not below `lichen fleet`."""
    app.command("export")(export)
    app.command("import")(import_)


@fleet.command()
def pull(
    context: typer.Context,
    target: Annotated[
        Optional[List[str]],
        typer.Argument(metavar="TARGET", help="Such as models/support. Default: what the fleet says."),
    ] = None,
    limit_rate: Annotated[
        Optional[str], typer.Option(metavar="BYTES", help="Most bytes a second, such as '500 kB'.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring this machine up to date now; after Ctrl-C the next pull goes on."""
    config = config_of(context, fleet_rate=limit_rate)
    if config.offline:
        raise OfflineError(
            "Offline mode is on, and a fleet is asked over the network.", hint="Or: lichen import PATH"
        )
    _finish(_pull(context, target or [], (), config.fleet_rate), as_json)


@fleet.command()
def state(context: typer.Context, as_json: AsJson = False) -> None:
    """Show this machine's fleet, whether it can take updates, and where each of them stands."""
    from lichen.sync.store import Store
    from lichen.sync.updates.ledger import Ledger

    now = _device(context).state()
    home = config_of(context).home
    slots = Store(home / "store").slots.mendable()
    record = home / "fleet" / "updates.db"
    latest = {}
    if record.is_file():
        ledger = Ledger(record)
        latest = ledger.latest()
        ledger.close()
    names = sorted({*slots, *latest})
    rows = [_row(name, slots.get(name), latest.get(name)) for name in names]
    if as_json:
        document = {
            "fleet": now.enrolment.fleet,
            "can_update": now.can_update,
            "expires": now.standing.expires.isoformat(),
            "versions": dict(now.standing.versions),
            "mirrors": now.enrolment.mirrors,
            "tags": now.enrolment.tags,
            "sentence": now.sentence,
            "updates": rows,
        }
        typer.echo(json.dumps(document, indent=2))
        return
    typer.echo(now.sentence)
    if rows:
        columns = ("active", "update", "state", "since")  # what 80 characters hold
        cells = ([row["name"], *(_brief(row, column) for column in columns)] for row in rows)
        table("", ["NAME", *(column.upper() for column in columns)], cells)
    for row in rows:
        if row["reason"]:
            typer.echo(f"{row['name']}: {row['reason']}")


@fleet.command()
def cancel(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Such as models/support.")],
    as_json: AsJson = False,
) -> None:
    """End the update of a name; what was in use before stays in use."""
    with _member(context, None) as member:
        ended = asyncio.run(member.updater.cancel(name))
    _show({"name": name, "state": ended.state}, as_json, f"Cancelled the update of {name}.")


def export(
    context: typer.Context,
    path: Folder,
    target: Annotated[
        Optional[List[str]], typer.Option("--target", metavar="TARGET", help="Only this one, and so on.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy the fleet's repository, as this machine has it, to a folder that other machines can import."""
    from lichen.sync.store import Store
    from lichen.sync.trust.exporting import export as to_folder

    config = config_of(context)
    store = Store(config.home / "store", offline=config.offline)
    running = lichen.__version__
    done = asyncio.run(to_folder(_device(context), store, path, target or [], running=running))
    words = f"Wrote {len(done)} target{'s' * (len(done) != 1)} to {path}: {', '.join(done) or 'none'}."
    _show({"path": str(path), "targets": done}, as_json, words)


def import_(
    context: typer.Context,
    path: Folder,
    target: Annotated[
        Optional[List[str]], typer.Option("--target", metavar="TARGET", help="Also this one, and so on.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Update this machine from a folder that holds the fleet's repository, without any network."""
    if not (path / "metadata" / "timestamp.json").is_file():
        raise FleetError(f"{path} holds no repository of a fleet.", hint="Make one: lichen export PATH")
    _finish(_pull(context, target or [], (path.resolve().as_uri(),), 0), as_json)


def _pull(context: typer.Context, targets: list[str], urls: tuple[str, ...], rate: int) -> list[Outcome]:
    from lichen.cli.fleet_adapters import follow
    from lichen.devices.probe import probe
    from lichen.runtime.trial import EngineTrial
    from lichen.sync.pace import RateLimit
    from lichen.sync.updates.slots import Slots

    config = config_of(context)
    threads = config.threads or probe().physical_cores
    trial = EngineTrial(threads=threads, memory_limit=config.memory_limit)
    with _member(context, trial, urls) as member, _Display() as display:
        pace = RateLimit(rate) if rate else None

        async def pull_and_tell() -> list[Outcome]:
            outcomes = await member.pull(targets, progress=display, pace=pace)
            try:
                await member.tell()
            except (FleetError, SourceError) as error:
                print(f"Reports wait for the next time: {error}", file=sys.stderr)
            return outcomes

        outcomes = asyncio.run(pull_and_tell())
    for line in follow(config, Slots(config.home / "store")):
        print(line, file=sys.stderr)
    return outcomes


class _member:
    """This machine's membership, closed at the end."""

    def __init__(self, context: typer.Context, trial: Any, urls: tuple[str, ...] = ()) -> None:
        from lichen.devices.hardware import class_here
        from lichen.sync.store import Store
        from lichen.sync.trust.member import Member

        config = config_of(context)
        self._member = Member(
            _device(context),
            config.home / "fleet",
            Store(config.home / "store", offline=config.offline),
            trial,
            running=lichen.__version__,
            clock=time.time,
            urls=urls,
            hardware=class_here(),
            on_change=lambda update: print(_line(update), file=sys.stderr, flush=True),
        )

    def __enter__(self) -> Member:
        return self._member

    def __exit__(self, *_: object) -> None:
        self._member.close()


class _Display:
    """Progress of bytes: a bar on a terminal, nothing elsewhere, where the states are lines enough."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> _Display:
        from lichen.cli.models import PullDisplay

        if sys.stderr.isatty():
            self._bar = PullDisplay(sys.stderr).__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)

    def __call__(self, now: FetchProgress) -> None:
        """Show one report."""
        if self._bar is not None:
            self._bar(now)


def _finish(outcomes: list[Outcome], as_json: bool) -> None:
    """Print the outcomes. Raises FleetError with the first error."""
    rows = [
        {
            "name": each.assignment.slot,
            "target": each.assignment.target,
            "state": each.update.state if each.update is not None else ("" if each.error else "confirmed"),
            "waiting": each.waiting,
            "error": each.error or (each.update.reason if each.update is not None else ""),
        }
        for each in outcomes
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif not rows:
        typer.echo("The fleet has nothing for this machine. Name what to pull, such as models/support.")
    for row in rows if not as_json else []:
        end = row["error"] or row["waiting"] or "is up to date."
        typer.echo(f"{row['name']}: {row['state'].replace('_', ' ')} {end}".replace(":  ", ": "))
    if any(row["error"] for row in rows):
        raise typer.Exit(1)


def _row(name: str, slot: Any, update: Update | None) -> dict[str, str]:
    def short(version: Any) -> str:
        return "" if version is None else f"{version.target} {version.sha256[:8]}"

    since = "" if update is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(update.entered))
    return {
        "name": name,
        "active": short(slot.active if slot is not None else None),
        "previous": short(slot.previous if slot is not None else None),
        "update": "" if update is None else update.target,
        "state": "" if update is None else update.state.replace("_", " "),
        "since": since,
        "reason": "" if update is None else update.reason,
    }


def _brief(row: dict[str, str], column: str) -> str:
    """A cell without the kind, which the name says."""
    kind, slash, _ = row["name"].partition("/")
    return row[column].removeprefix(kind + slash)


def _line(update: Update) -> str:
    end = f" ({update.reason})" if update.reason else ""
    return f"{update.slot}: {update.state.replace('_', ' ')}{end}"
