"""`lichen fleet collect`: the collector; `lichen fleet members`: whose reports count in it."""

from __future__ import annotations

import asyncio
import secrets
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

import lichen
from lichen.cli.fleet import AsJson, _needs_extra, fleet
from lichen.cli.rollouts import seconds
from lichen.cli.settings import table
from lichen.errors import ConfigError, FleetError, LichenError

if TYPE_CHECKING:
    from lichen.sync.collector.app import Policies
    from lichen.sync.collector.database import Database
    from lichen.sync.trust.enrolment import Enrolment

MAX_DEVICES = 100_000
RETENTION = "90d"
POLICY_S = 60.0  # seconds between two looks at the fleet's policies

Data = Annotated[Path, typer.Argument(metavar="DATA", help="The collector's folder.")]


def register(app: typer.Typer) -> None:
    """The commands belong to `lichen fleet`, which is registered by its own module."""


@fleet.command()
def collect(
    data: Data,
    bundle: Annotated[Path, typer.Option("--bundle", metavar="PATH", help="The fleet's enrolment bundle.")],
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where to listen; port 0 takes a free one.")
    ] = "127.0.0.1:8643",
    approve: Annotated[bool, typer.Option("--approve", help="New devices wait for a person.")] = False,
    max_devices: Annotated[int, typer.Option(help="Devices that may join.")] = MAX_DEVICES,
    retention: Annotated[str, typer.Option(help="How long outcomes are kept.")] = RETENTION,
    tls_cert: Annotated[Optional[Path], typer.Option(help="Certificate (PEM): speak HTTPS.")] = None,
    tls_key: Annotated[Optional[Path], typer.Option(help="Private key of the certificate (PEM).")] = None,
    behind_proxy: Annotated[
        bool, typer.Option("--behind-proxy", help="Listen beyond this machine without TLS: a proxy has it.")
    ] = False,
) -> None:
    """Take reports of a fleet's devices, and show what became of rollouts."""
    _needs_extra()
    from lichen.runtime.http.tls import server_context
    from lichen.sync.collector.app import CollectorApp, listening
    from lichen.sync.collector.desk import Desk
    from lichen.sync.trust.enrolment import LOOPBACK

    enrolment = _bundle(bundle)
    if enrolment.token is None:
        raise ConfigError(
            "The bundle has no token for a collector.", hint="Make the fleet with --collector URL."
        )
    token, (host, port) = enrolment.token, _address(listen)
    tls = server_context(tls_cert, tls_key)
    if tls is None and host not in LOOPBACK and not behind_proxy:
        raise ConfigError(
            f"On {host} the tokens of this collector could be read by its whole network.",
            hint="Give --tls-cert and --tls-key, or say --behind-proxy.",
        )
    reader = _reader(data)
    database = _database(data, max_devices, seconds(retention))
    desk = Desk(database, fleet=enrolment.fleet, token=token, clock=time.time, approve=approve)
    policies = _policies(data, bundle)

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        app = CollectorApp(desk, reader=reader, policies=policies)
        async with listening(app, host, port, tls) as url:
            typer.echo(f"Listening on {url}; the reader's token is in {data / 'reader.token'}")
            await stop.wait()

    asyncio.run(run())


@fleet.command()
def members(
    data: Data,
    approve: Annotated[
        Optional[str], typer.Option(metavar="ID", help="Let a device's reports count; 'all' that wait.")
    ] = None,
    expel: Annotated[
        Optional[str], typer.Option(metavar="ID", help="Take nothing more from a device.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the devices that a collector knows, let them in, or expel them."""
    _needs_extra()
    import msgspec

    if not (data / "collector.db").is_file():
        raise FleetError(f"There is no collector in {data}.", hint="Start one: lichen fleet collect")
    database = _database(data, MAX_DEVICES, seconds(RETENTION))
    try:
        if expel is not None:
            database.change(expel, "expelled")
        waiting = [each.id for each in database.members() if each.membership == "waiting"]
        for device in waiting if approve == "all" else [approve] if approve is not None else []:
            database.change(device, "member")
        found = database.members()
    finally:
        database.close()
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
        return
    rows = (
        (each.id, each.membership, _ago(each.seen), each.lichen, each.hardware, _tags(each.tags))
        for each in found
    )
    table("", ("DEVICE", "", "SEEN", "LICHEN", "HARDWARE", "TAGS"), rows)


def _bundle(path: Path) -> Enrolment:
    from lichen.sync.trust.enrolment import LIMIT, read_enrolment

    try:
        with path.open("rb") as stream:
            return read_enrolment(stream.read(LIMIT + 1))
    except OSError as error:
        raise FleetError(f"{path} cannot be read: {error.strerror}.") from error


def _database(data: Path, max_devices: int, retention: float) -> Database:
    from lichen.sync.collector.database import Database

    return Database(data / "collector.db", max_devices=max_devices, retention=retention)


def _reader(data: Path) -> str:
    """The token that opens the page and the numbers, made on the first start; mode 0600."""
    from lichen.durable import write_file

    path = data / "reader.token"
    try:
        if not path.exists():
            write_file(path, secrets.token_urlsafe(32).encode() + b"\n", mode=0o600)
        token = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise FleetError(f"{path} cannot be used: {error}.") from error
    if len(token) < 16:
        raise FleetError(f"{path} holds no token.", hint="Delete it; the next start makes a new one.")
    return token


def _policies(data: Path, bundle: Path) -> Policies:
    """Rollouts as a device of the fleet would see them: verified, and asked for once a minute."""
    from lichen.sync.rollout import Policy
    from lichen.sync.trust.device import Device
    from lichen.sync.trust.policies import fetch_policy

    device = Device(data / "fleet")
    device.enrol(bundle.read_bytes())
    known: dict[str, tuple[float, Policy | None]] = {}

    async def policy(slot: str) -> Policy | None:
        then, found = known.get(slot, (-POLICY_S, None))
        if time.monotonic() - then >= POLICY_S:
            name = slot.partition("/")[2]
            with suppress(LichenError):  # what was seen last is shown, and devices are counted without it
                found = await fetch_policy(device, name, kept=data / "policies", running=lichen.__version__)
            known[slot] = (time.monotonic(), found)
        return found if found is not None and slot == f"{found.kind}/{found.name}" else None

    return policy


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65_535:
        raise ConfigError(f"{text!r} is no address to listen on.", hint="Write it like 127.0.0.1:8643.")
    return host.strip("[]") or "127.0.0.1", int(port)


def _ago(moment: float) -> str:
    passed = max(0.0, time.time() - moment)
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60)):
        if passed >= length:
            return f"{passed / length:.0f}{unit} ago"
    return "now"


def _tags(tags: dict[str, str]) -> str:
    return ", ".join(f"{name}={words}" for name, words in sorted(tags.items()))
