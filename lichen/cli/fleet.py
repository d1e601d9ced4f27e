"""`lichen fleet`: publish to a fleet of machines, and belong to one."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, List, Optional

import msgspec
import typer

import lichen
from lichen.cli.settings import config_of, table
from lichen.errors import ConfigError, FleetError, TrustError

if TYPE_CHECKING:
    from lichen.sync.trust.device import Device
    from lichen.sync.trust.publisher import Publisher

_GROUP: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None}
fleet = typer.Typer(help="Publish to a fleet of machines, and belong to one.", **_GROUP)
keys = typer.Typer(help="The keys that sign for a fleet.", **_GROUP)
fleet.add_typer(keys, name="keys")

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The repository's folder.")]
KeysOption = Annotated[
    Optional[Path],
    typer.Option("--keys", metavar="PATH", help="Folder of the keys. Default: FOLDER-keys, beside it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(fleet, name="fleet")


@fleet.command("init")
def init(
    folder: Folder,
    mirror: Annotated[List[str], typer.Option("--mirror", metavar="URL", help="Where devices find it.")],
    name: Annotated[str, typer.Option("--name", help="The fleet's name.")] = "fleet",
    folder_of_keys: KeysOption = None,
    root_keys: Annotated[int, typer.Option(help="How many root keys.")] = 3,
    threshold: Annotated[int, typer.Option(help="How many of them must sign.")] = 2,
    tag: Annotated[
        Optional[List[str]], typer.Option("--tag", metavar="NAME=WORDS", help="What enrolled devices are.")
    ] = None,
    collector: Annotated[
        Optional[str], typer.Option(metavar="URL", help="Where devices report; see 'lichen fleet collect'.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a repository, its keys, and the bundle that enrols devices."""
    _needs_extra()
    from lichen.durable import write_file
    from lichen.sync.trust.enrolment import Enrolment, read_enrolment, write_enrolment

    draft = Enrolment(
        fleet=name,
        root=b"{}",
        mirrors=tuple(mirror),
        tags=_tags(tag or []),
        collector=collector,
        token=None if collector is None else secrets.token_urlsafe(24),
    )
    read_enrolment(write_enrolment(draft))  # refuses bad names and mirrors before any key is made
    publisher = _publisher(folder, folder_of_keys, confirm=True)
    root = publisher.init(root_keys=root_keys, threshold=threshold)
    bundle = msgspec.structs.replace(draft, root=root)
    write_file(folder / "enrolment.json", write_enrolment(bundle))
    made = {
        "repository": str(folder),
        "keys": str(_keys_folder(folder, folder_of_keys)),
        "bundle": str(folder / "enrolment.json"),
        "fingerprint": bundle.fingerprint,
    }
    _show(
        made,
        as_json,
        f"Made the repository of {name} in {folder}. Its root's fingerprint is {bundle.fingerprint}.\n"
        f"Keep the root keys in {made['keys']} apart from the others; devices enrol with {made['bundle']}.",
    )


@fleet.command()
def publish(
    folder: Folder,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What to publish.")],
    kind: Annotated[str, typer.Option(help="models, adapters, mixtures, checkpoints or policies.")],
    licence: Annotated[str, typer.Option(help="SPDX expression, such as Apache-2.0.")],
    name: Annotated[Optional[str], typer.Option(help="Its name. Default: the file's.")] = None,
    base: Annotated[Optional[str], typer.Option(metavar="SHA256", help="Model that it fits.")] = None,
    lineage: Annotated[
        Optional[List[str]],
        typer.Option("--lineage", metavar="WHAT[=SHA256]", help="What it was made from, nearest first."),
    ] = None,
    min_lichen: Annotated[
        Optional[str], typer.Option(metavar="VERSION", help="Oldest lichen for it.")
    ] = None,
    health: Annotated[
        Optional[Path],
        typer.Option("--health", metavar="PATH", help="JSON file: the bar of the trial on each device."),
    ] = None,
    field: Annotated[
        Optional[List[str]],
        typer.Option("--field", metavar="NAME=JSON", help="Another field of the kind's manifest."),
    ] = None,
    folder_of_keys: KeysOption = None,
    as_json: AsJson = False,
) -> None:
    """Add a file to the fleet's repository, or replace it."""
    _needs_extra()
    from lichen.sync.manifest import custom_of, make_manifest

    if not file.is_file():
        raise FleetError(f"There is no file {file}.")
    fields: dict[str, Any] = {
        **(_of_model(file) if kind == "models" else {}),
        **({"health": _health(health)} if health is not None else {}),
        **{key: _value(text) for key, text in map(_pair, field or [])},
        "kind": kind,
        "name": name or file.name,
        "size": file.stat().st_size,
        "licence": licence,
        "base": base,
        "min_lichen": min_lichen,
        "lineage": [_ancestor(text) for text in lineage or []],
    }
    manifest = make_manifest(fields, running=lichen.__version__)
    target = _publisher(folder, folder_of_keys).publish(file, manifest)
    shown = {"path": target.path, "sha256": target.hashes["sha256"], "manifest": custom_of(manifest)}
    _show(shown, as_json, f"Published {target.path}, sha256:{target.hashes['sha256']}.")


@fleet.command()
def renew(
    folder: Folder,
    role: Annotated[
        Optional[List[str]], typer.Option("--role", help="Also this role, such as snapshot or adapters.")
    ] = None,
    folder_of_keys: KeysOption = None,
) -> None:
    """Sign the timestamp anew, before it expires."""
    _needs_extra()
    _publisher(folder, folder_of_keys).renew(["timestamp", *(role or [])])
    typer.echo("Renewed: " + ", ".join(dict.fromkeys(["timestamp", *(role or [])])))


@keys.command("list")
def list_keys(folder: Folder, folder_of_keys: KeysOption = None, as_json: AsJson = False) -> None:
    """List the roles: version, expiry, threshold, and where each key is."""
    _needs_extra()
    publisher = _publisher(folder, folder_of_keys)
    rows = publisher.roles()
    if as_json:
        typer.echo(json.dumps([row._asdict() for row in rows], indent=2))
        return
    shown = ((r.role, r.version, r.expires, r.threshold, ", ".join(map(_key_line, r.keys))) for r in rows)
    table("", ("ROLE", "VERSION", "EXPIRES", "THRESHOLD", "KEYS"), shown)


@keys.command()
def rotate(
    folder: Folder,
    role: Annotated[str, typer.Argument(help="root, timestamp, snapshot, targets, or a kind.")],
    lost: Annotated[
        Optional[List[str]], typer.Option("--lost", metavar="NAME", help="Replace only this root key.")
    ] = None,
    folder_of_keys: KeysOption = None,
    as_json: AsJson = False,
) -> None:
    """Give a role new keys; devices follow by themselves."""
    _needs_extra()
    names = _publisher(folder, folder_of_keys).rotate(role, lost or ())
    _show({"role": role, "keys": names}, as_json, f"New keys of {role}: {', '.join(names)}.")


@fleet.command()
def enrol(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The fleet's enrolment bundle.")],
    fingerprint: Annotated[
        Optional[str], typer.Option(metavar="SHA256", help="What the fleet's root must have.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Leave the present fleet.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make this machine a member of a fleet."""
    from lichen.sync.trust.enrolment import LIMIT

    device = _device(context)
    try:
        with bundle.open("rb") as stream:
            data = stream.read(LIMIT + 1)
    except OSError as error:
        raise FleetError(f"{bundle} cannot be read: {error.strerror}.") from error
    taken = device.enrol(data, fingerprint=fingerprint, replace=replace)
    _show(
        {
            "fleet": taken.fleet,
            "fingerprint": taken.fingerprint,
            "mirrors": taken.mirrors,
            "tags": taken.tags,
        },
        as_json,
        f"This machine is in the fleet {taken.fleet}, whose root has the fingerprint {taken.fingerprint}.",
    )


@fleet.command()
def verify(
    context: typer.Context,
    target: Annotated[
        Optional[str], typer.Argument(metavar="TARGET", help="Such as adapters/support.")
    ] = None,
    file: Annotated[
        Optional[Path], typer.Option("--file", metavar="PATH", help="A file that must be this target.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Refresh the fleet's metadata and check it, a target, or a file against a target."""
    device = _device(context)
    if config_of(context).offline:
        from lichen.errors import OfflineError

        raise OfflineError("Offline mode is on, and a fleet is asked over the network.")
    if target is None:
        versions = dict(asyncio.run(device.refresh()).versions)
        _show(versions, as_json, "Verified: " + ", ".join(f"{r} {v}" for r, v in versions.items()) + ".")
        return
    from lichen.sync.download import hash_file
    from lichen.sync.manifest import custom_of

    found = asyncio.run(device.target(target, running=lichen.__version__))
    if file is not None:
        try:
            same = file.stat().st_size == found.size and hash_file(file) == found.sha256
        except OSError as error:
            raise FleetError(f"{file} cannot be read: {error.strerror}.") from error
        if not same:
            raise TrustError(f"{file} is not what the fleet signed as {target}.")
    shown = {"path": target, "sha256": found.sha256, "manifest": custom_of(found.manifest)}
    _show(shown, as_json, f"Verified: {target}, {found.size:,} bytes, sha256:{found.sha256}.")


def _device(context: typer.Context) -> Device:
    _needs_extra()
    from lichen.sync.trust.device import Device

    return Device(config_of(context).home / "fleet")


def _publisher(folder: Path, folder_of_keys: Path | None, *, confirm: bool = False) -> Publisher:
    from lichen.sync.trust.device import utc_now
    from lichen.sync.trust.publisher import Publisher
    from lichen.sync.trust.signers import Signers

    signers = Signers(_keys_folder(folder, folder_of_keys), _passphrase(confirm))
    return Publisher(folder, signers, clock=utc_now)


def _keys_folder(folder: Path, given: Path | None) -> Path:
    """Never inside the repository, which is copied to web servers. Raises FleetError."""
    chosen = folder.with_name(f"{folder.resolve().name}-keys") if given is None else given
    if chosen.resolve().is_relative_to(folder.resolve()):
        raise FleetError(f"The keys must not lie in {folder}, which everybody may read.", hint="Set --keys.")
    return chosen


def _passphrase(confirm: bool) -> Callable[[], str]:
    def ask() -> str:
        given = os.environ.get("LICHEN_FLEET_PASSPHRASE")
        if given is None and not sys.stdin.isatty():
            raise ConfigError("The keys need a passphrase.", hint="Set LICHEN_FLEET_PASSPHRASE.")
        return given or str(
            typer.prompt("Passphrase of the keys", hide_input=True, confirmation_prompt=confirm)
        )

    return ask


def _needs_extra() -> None:
    """Raises FleetError where the extra `fleet` is not installed."""
    from importlib.util import find_spec

    if find_spec("tuf") is None:
        raise FleetError("Fleets need more packages.", hint="pip install 'lichen[fleet]'")


def _of_model(file: Path) -> dict[str, Any]:
    """What a model's own header says for its manifest. Raises ModelFileError."""
    from lichen.quant.gguf_check import check_gguf

    summary = check_gguf(file)
    return {"architecture": summary.architecture, "context": summary.context_train}


def _health(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FleetError(f"{path} cannot be read as JSON: {error}.") from error


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise FleetError(f"{text!r} is not of the form NAME=VALUE.")
    return name, value


def _value(text: str) -> Any:
    """JSON, or else the words themselves."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _tags(given: list[str]) -> dict[str, str]:
    return dict(map(_pair, given))


def _ancestor(text: str) -> dict[str, str]:
    what, equals, digest = text.partition("=")
    return {"what": what, "sha256": digest} if equals else {"what": what}


def _key_line(key: dict[str, str]) -> str:
    return f"{key['name']} ({key['uri'].partition(':')[0] or 'elsewhere'})"


def _show(values: dict[str, Any], as_json: bool, sentence: str) -> None:
    typer.echo(json.dumps(values, indent=2) if as_json else sentence)
