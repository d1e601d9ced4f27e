"""`lichen fleet rollout` and its kin: a publisher sends a version out in waves, and takes it back."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, List, Optional

import msgspec
import typer

from lichen.cli.fleet import AsJson, Folder, KeysOption, _keys_folder, _needs_extra, _pair, _publisher, fleet
from lichen.cli.settings import table
from lichen.errors import ConfigError, FleetError, NotFound, SourceError
from lichen.sync.certificates import trusted

if TYPE_CHECKING:
    from lichen.sync.collector.board import Board, Census
    from lichen.sync.gates import Verdict
    from lichen.sync.rollout import Gates, Kind, Policy, Wave
    from lichen.sync.trust.rollouts import Rollouts

READER = "LICHEN_FLEET_READER"
_TIMES = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_WAVE = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)%?")

Name = Annotated[str, typer.Argument(metavar="NAME", help="What is rolled out, such as support.")]
Because = Annotated[str, typer.Option("--reason", help="Why; devices and people see it.")]
Share = Optional[float]


def register(app: typer.Typer) -> None:
    """The commands belong to `lichen fleet`, which is registered by its own module."""


@fleet.command("rollout")
def rollout(
    folder: Folder,
    name: Name,
    kind: Annotated[str, typer.Option(help="models, adapters, mixtures or checkpoints.")] = "models",
    version: Annotated[
        Optional[str], typer.Option(help="Version to roll out: the target NAME-VERSION.")
    ] = None,
    previous: Annotated[
        Optional[str], typer.Option(help="Version to go back to. Default: the last rollout's.")
    ] = None,
    waves: Annotated[str, typer.Option(help="Shares of the devices, one a wave.")] = "1%,10%,100%",
    wave: Annotated[
        Optional[List[str]],
        typer.Option("--wave", metavar="'P% tag:NAME=WORDS hardware:CLASS'", help="One wave, instead."),
    ] = None,
    max_errors: Annotated[Share, typer.Option(help="Share of requests that may fail.")] = 0.01,
    max_rollbacks: Annotated[Share, typer.Option(help="Share of devices that may go back.")] = 0.005,
    min_quality: Annotated[Share, typer.Option(help="Mean quality of health prompts, 0 to 1.")] = None,
    min_speed: Annotated[Share, typer.Option(help="Tokens/s over tokens/s before.")] = 0.8,
    min_reports: Annotated[int, typer.Option(help="Devices that must have come to an opinion.")] = 10,
    soak: Annotated[str, typer.Option(help="How long a wave stays open at least.")] = "1h",
    patience: Annotated[Optional[str], typer.Option(help="A wave without its reports fails then.")] = None,
    spread: Annotated[str, typer.Option(help="Time over which the devices of a wave start.")] = "0s",
    automatic: Annotated[bool, typer.Option("--automatic", help="Open waves without a person.")] = False,
    stop_only: Annotated[
        bool, typer.Option("--stop-only", help="A missed gate stops; devices stay.")
    ] = False,
    advance: Annotated[
        bool, typer.Option("--advance", help="Judge a rollout, and open its next wave.")
    ] = False,
    folder_of_keys: KeysOption = None,
    as_json: AsJson = False,
) -> None:
    """Roll a published version out in waves, or take the next step of a rollout."""
    _needs_extra()
    rollouts = _rollouts(folder, folder_of_keys)
    if advance:
        policy, verdict = asyncio.run(_step(rollouts, folder, name, person=True))
        _show(policy, as_json, verdict)
        return
    if version is None:
        raise ConfigError("A rollout needs a version.", hint="Say --version, or --advance to go on with one.")
    gates = _gates(
        max_errors=max_errors,
        max_rollbacks=max_rollbacks,
        min_quality=min_quality,
        min_speed=min_speed,
        min_reports=min_reports,
        soak_s=seconds(soak),
        patience_s=None if patience is None else seconds(patience),
    )
    planned = _waves(wave or waves.split(","), gates, spread_s=seconds(spread), hold=not automatic)
    policy = rollouts.start(_kind(kind), name, version, planned, previous=previous, stop_only=stop_only)
    _show(policy, as_json)
    if not as_json:
        typer.echo(_what_shows(min_reports))


@fleet.command()
def pause(
    folder: Folder,
    name: Name,
    reason: Because = "",
    folder_of_keys: KeysOption = None,
    as_json: AsJson = False,
) -> None:
    """Let no more devices take the version; those that have it keep it."""
    from lichen.sync import rollout as steps

    _change(folder, name, folder_of_keys, as_json, lambda policy: steps.pause(policy, reason))


@fleet.command()
def resume(folder: Folder, name: Name, folder_of_keys: KeysOption = None, as_json: AsJson = False) -> None:
    """Go on with a paused rollout."""
    from lichen.sync import rollout as steps

    _change(folder, name, folder_of_keys, as_json, steps.resume)


@fleet.command()
def rollback(
    folder: Folder,
    name: Name,
    reason: Because = "",
    folder_of_keys: KeysOption = None,
    as_json: AsJson = False,
) -> None:
    """Send every device back to the version before."""
    from lichen.sync import rollout as steps

    _change(folder, name, folder_of_keys, as_json, lambda policy: steps.roll_back(policy, reason))


@fleet.command()
def watch(
    folder: Folder,
    name: Annotated[
        Optional[str], typer.Argument(metavar="NAME", help="One rollout. Default: all of them.")
    ] = None,
    every: Annotated[str, typer.Option(help="Time between two looks at the collector.")] = "60s",
    once: Annotated[bool, typer.Option("--once", help="Look once and leave.")] = False,
    folder_of_keys: KeysOption = None,
) -> None:
    """Judge rollouts from time to time; open waves that need no person, and stop those that fail."""
    _needs_extra()
    asyncio.run(_watch(_rollouts(folder, folder_of_keys), folder, name, seconds(every), once))


@fleet.command()
def status(
    folder: Folder,
    name: Annotated[
        Optional[str], typer.Argument(metavar="NAME", help="One rollout. Default: all of them.")
    ] = None,
    folder_of_keys: KeysOption = None,
    as_json: AsJson = False,
) -> None:
    """Show rollouts: waves, versions, states, failures and quality, as devices report them."""
    _needs_extra()
    from lichen.sync.collector.board import board

    rollouts = _rollouts(folder, folder_of_keys)
    policies = rollouts.all() if name is None else [rollouts.get(name)]
    boards = [board(asyncio.run(_census_or_nothing(folder, policy)), policy) for policy in policies]
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(boards), indent=2).decode())
        return
    if not boards:
        typer.echo("There is no rollout. Begin one: lichen fleet rollout")
    for each in boards:
        _print_board(each)


def seconds(text: str) -> float:
    """A time such as 90, 30s, 5m, 1.5h or 2d in seconds. Raises ConfigError."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smhd]?)", text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is no time.", hint="Write it like 90s, 5m, 1.5h or 2d.")
    return float(match[1]) * _TIMES[match[2] or "s"]


def _kind(text: str) -> Kind:
    from lichen.sync.rollout import Kind

    try:
        kind: Kind = msgspec.convert(text, Kind)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"A rollout is of models, adapters, mixtures or checkpoints, not of {text}."
        ) from error
    return kind


def _what_shows(reports: int) -> str:
    from lichen.sync.gates import detectable

    share = detectable(reports)
    return f"{reports} reports show a fault that hits {share:.1%} of devices or more, 19 times of 20."


def _waves(specifications: list[str], gates: Gates, **more: Any) -> tuple[Wave, ...]:
    from lichen.sync.rollout import Wave

    waves = []
    for text in specifications:
        percent, *conditions = text.split() or [""]
        match = _WAVE.fullmatch(percent)
        if match is None:
            raise ConfigError(f"{text!r} is no wave.", hint="Write it like 10%, or '10% tag:site=oslo'.")
        fields: dict[str, Any] = {"percent": float(match[1]), "tags": {}, "hardware": [], **more}
        for condition in conditions:
            what, colon, value = condition.partition(":")
            if what == "tag" and colon:
                tag, words = _pair(value)
                fields["tags"][tag] = words
            elif what == "hardware" and colon:
                fields["hardware"].append(value)
            else:
                raise ConfigError(f"{condition!r} is no condition.", hint="There are tag:N=W and hardware:C.")
        waves.append(_checked({**fields, "gates": msgspec.to_builtins(gates)}, Wave))
    return tuple(waves)


def _gates(**fields: Any) -> Gates:
    from lichen.sync.rollout import Gates

    gates: Gates = _checked(fields, Gates)
    return gates


def _checked(fields: dict[str, Any], kind: type[Any]) -> Any:
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"The {kind.__name__.lower()} cannot be: {error}.") from error


def _rollouts(folder: Path, folder_of_keys: Path | None) -> Rollouts:
    from lichen.sync.trust.device import utc_now
    from lichen.sync.trust.rollouts import Rollouts

    lock = _keys_folder(folder, folder_of_keys) / "rollouts.lock"
    return Rollouts(_publisher(folder, folder_of_keys), folder, lock, clock=utc_now)


def _change(
    folder: Path,
    name: str,
    folder_of_keys: Path | None,
    as_json: bool,
    step: Callable[[Policy], Policy],
) -> None:
    _needs_extra()
    _show(_rollouts(folder, folder_of_keys).change(name, step), as_json)


async def _census_or_nothing(folder: Path, policy: Policy) -> Census:
    """What the collector knows; where it cannot be asked, that is said, and what is signed is shown alone."""
    from lichen.sync.collector.reading import empty, slot_of
    from lichen.sync.trust.device import utc_now

    try:
        return await _census(folder, policy)
    except (FleetError, SourceError, ConfigError) as error:
        typer.echo(str(error), err=True)
        return empty(slot_of(policy), utc_now())


async def _census(folder: Path, policy: Policy) -> Census:
    """What the collector of the fleet's bundle knows. Raises FleetError, SourceError, ConfigError."""
    import httpx

    from lichen.sync.collector.reading import empty, read_census, slot_of
    from lichen.sync.trust.device import utc_now
    from lichen.sync.trust.enrolment import read_enrolment

    try:
        collector = read_enrolment((folder / "enrolment.json").read_bytes()).collector
    except OSError as error:
        raise FleetError(f"{folder / 'enrolment.json'} cannot be read: {error.strerror}.") from error
    slot = slot_of(policy)
    if collector is None:
        raise FleetError(
            "This fleet has no collector, so that nobody knows how the wave went.",
            hint="Make the fleet with --collector URL.",
        )
    token = os.environ.get(READER, "")
    if not token:
        raise ConfigError("The collector needs a token.", hint=f"Set {READER} to its reader.token.")
    async with httpx.AsyncClient(verify=trusted(), timeout=30, follow_redirects=False) as client:
        return await read_census(client, collector, token, slot) or empty(slot, utc_now())


async def _step(rollouts: Rollouts, folder: Path, name: str, *, person: bool) -> tuple[Policy, Verdict]:
    from lichen.sync.collector.reading import step
    from lichen.sync.trust.device import utc_now

    census = await _census(folder, await asyncio.to_thread(rollouts.get, name))
    return await asyncio.to_thread(step, rollouts, name, census, utc_now(), person=person)


async def _watch(rollouts: Rollouts, folder: Path, name: str | None, every: float, once: bool) -> None:
    """Look for ever; what goes wrong once is said, and tried again. Says only what is new."""
    said: dict[str, str] = {}
    while True:
        names = [name] if name is not None else [each.name for each in await asyncio.to_thread(rollouts.all)]
        for each in names:
            try:
                policy, verdict = await _step(rollouts, folder, each, person=False)
                line = f"{each}: {_state(policy)}. {verdict.reason}"
                if verdict.waits_for_person:
                    line += f" Open the next wave: lichen fleet rollout {folder} {each} --advance"
            except (SourceError, NotFound, FleetError) as error:
                if once:
                    raise
                line = f"{each}: {error}"
            if said.get(each) != line:
                said[each] = line
                typer.echo(line)
        if once:
            return
        await asyncio.sleep(every)


def _state(policy: Policy) -> str:
    words = policy.state.replace("_", " ")
    return f"{words}, {policy.opened} of {len(policy.waves)} waves open"


def _show(policy: Policy, as_json: bool, verdict: Verdict | None = None) -> None:
    if as_json:
        shown = {"policy": msgspec.to_builtins(policy), "verdict": msgspec.to_builtins(verdict)}
        typer.echo(msgspec.json.format(msgspec.json.encode(shown), indent=2).decode())
        return
    typer.echo(f"{policy.version.path}: {_state(policy)}." + (f" {verdict.reason}" if verdict else ""))


def _print_board(board: Board) -> None:
    from lichen.sync.collector.page import states

    state = board.state.replace("_", " ")
    typer.echo(f"{board.slot}: {state}, to {board.target}. {board.reason}".rstrip())
    if board.verdict is not None and board.verdict.reason != board.reason:
        typer.echo(board.verdict.reason)
    waves = (
        (each.number, each.condition, "open" if each.open else "closed", each.devices, states(each.states))
        for each in board.waves
    )
    table("", ("WAVE", "WHO", "", "DEVICES", "STATES"), waves)
    table("", ("VERSION", "DEVICES"), board.versions.items())
    if board.failures:
        rows = ((each.target, f"{each.cause} {each.code}", each.devices) for each in board.failures)
        table("", ("FAILED", "WHY", "DEVICES"), rows)
    if board.quality is not None:
        typer.echo(f"Quality: {board.quality:.3f}.")
    if board.silent:
        typer.echo(f"{board.silent:,} of {board.devices:,} devices have been silent for a week.")
