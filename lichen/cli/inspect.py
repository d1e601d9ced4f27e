"""`lichen ps`, `lichen doctor`, `lichen config`: what runs, what is wrong, and what is set."""

from __future__ import annotations

import asyncio
import json
import platform
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from lichen.cli.settings import Given, config_of, megabytes, table
from lichen.errors import LichenError, Unavailable

if TYPE_CHECKING:
    from lichen.config import Config

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(ps)
    app.command()(doctor)
    app.command("config")(show_config)


def ps(context: typer.Context, as_json: AsJson = False) -> None:
    """Show what the running daemon does."""
    status = asyncio.run(_status(config_of(context)))
    if as_json:
        typer.echo(json.dumps(status, indent=2))
        return
    slots, queue, kv = (status.get(key, {}) for key in ("slots", "queue", "kv"))
    counters = status.get("counters", {})
    rows: list[tuple[str, Any]] = [("state", status["state"]), ("process", status["pid"])]
    rows += [
        ("model", f"{m['name']}, context {m['context']}, {megabytes(m['size'])}") for m in status["models"]
    ]
    rows += [
        ("slots busy", f"{slots.get('busy', 0)} of {slots.get('total', 0)}"),
        ("waiting", f"{queue.get('waiting', 0)} of {queue.get('limit', 0)}"),
        ("KV cells", f"{kv.get('cells_used', 0)} of {kv.get('cells_total', 0)}"),
        ("answered", f"{counters.get('completed', 0)}, {counters.get('completion_tokens', 0)} tokens"),
        ("memory", megabytes(status["rss_bytes"])),
        ("up", f"{status['uptime_s']:.0f} s"),
    ]
    table("", ("WHAT", "NOW"), rows)


async def _status(config: Config) -> dict[str, Any]:
    import httpx

    from lichen.cli.answering import daemon_client

    async with daemon_client(config) as client:
        try:
            answer = await client.get("/status", timeout=5)
            body: dict[str, Any] = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            where = config.uds or f"{config.host}:{config.port}"
            raise Unavailable(
                f"No lichen daemon answers at {where}.", hint="Start one: lichen serve"
            ) from error
    if answer.status_code != 200:
        raise LichenError(body["error"]["message"])
    return body


def show_config(context: typer.Context, as_json: AsJson = False) -> None:
    """Show every setting and where its value comes from."""
    from lichen.config import SETTINGS, shown

    given: Given = context.obj
    effective = given.effective()
    rows = [(name, shown(effective.config, name), str(effective.origin[name])) for name in SETTINGS]
    if as_json:
        typer.echo(
            json.dumps({name: {"value": value, "from": origin} for name, value, origin in rows}, indent=2)
        )
    else:
        table("", ("SETTING", "VALUE", "FROM"), rows)


class Finding(NamedTuple):
    """One line of the doctor: what was looked at, the verdict, and what to do about it."""

    what: str
    verdict: Literal["fine", "warning", "problem"]
    detail: str


def doctor(context: typer.Context, as_json: AsJson = False) -> None:
    """Check this machine: what is fine, what is not, and what to do."""
    findings = list(_findings(config_of(context)))
    if as_json:
        typer.echo(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        table("", ("CHECK", "VERDICT", "DETAIL"), findings)
    if any(finding.verdict == "problem" for finding in findings):
        raise typer.Exit(1)


def _findings(config: Config) -> Iterator[Finding]:
    from lichen.devices.probe import compilers, disk_free, probe

    machine = probe()
    yield Finding("Python", "fine", platform.python_version())
    missing = [name for name, path in compilers().items() if path is None]
    yield Finding(
        "compiler",
        "warning" if missing else "fine",
        f"no {' and no '.join(missing)} compiler; needed to build llama.cpp (apt install build-essential)"
        if missing
        else "C and C++ found",
    )
    slow = machine.isa in ("x86-64", "x86-64-v2")
    features = f" ({', '.join(machine.features)})" if machine.features else ""
    yield Finding(
        "processor",
        "warning" if slow else "fine",
        f"{machine.cpu}, {machine.isa}{features}, {machine.cores:g} cores"
        + (": no AVX2, so slow" if slow else ""),
    )
    scarce = machine.memory_available < 1 << 30
    yield Finding(
        "memory",
        "warning" if scarce else "fine",
        f"{megabytes(machine.memory_available)} of {megabytes(machine.memory_total)} available"
        + (": lower --context or --slots" if scarce else ""),
    )
    free = disk_free(config.home)
    yield Finding(
        "disk",
        "problem" if free < 200 << 20 else "warning" if free < 2 << 30 else "fine",
        f"{megabytes(free)} free at {config.home}"
        + ("" if free >= 2 << 30 else ": free some, or set LICHEN_HOME"),
    )
    yield from _store_findings(config)
    yield _bindings()
    yield _port(config)


def _store_findings(config: Config) -> Iterator[Finding]:
    from lichen.sync.store import Store

    store = Store(config.home / "store", offline=config.offline)
    try:
        manifests = store.manifests()
        present = store.resolve(config.model)
    except LichenError as error:
        yield Finding("store", "problem", str(error))
        return
    yield Finding("store", "fine", f"{len(manifests)} models, {megabytes(sum(m.size for m in manifests))}")
    if present is None and not config.model.endswith(".gguf"):
        yield Finding("model", "warning", f"{config.model} is not here yet: lichen pull")
    else:
        yield Finding("model", "fine", config.model)


def _bindings() -> Finding:
    from lichen.runtime import native

    try:
        return Finding("llama.cpp", "fine", f"bindings {native.version()}, {native.system_info()}")
    except (LichenError, ImportError) as error:
        return Finding("llama.cpp", "problem", f"{error} Run: pip install llama-cpp-python")


def _port(config: Config) -> Finding:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        taken = config.uds is None and probe.connect_ex((config.host, config.port)) == 0
    if not taken:
        return Finding("daemon", "fine", "none runs; start one with: lichen serve")
    try:
        state = asyncio.run(_status(config))["state"]
        return Finding("daemon", "fine", f"runs at {config.host}:{config.port}, {state}")
    except LichenError:
        return Finding("daemon", "warning", f"another program has port {config.port}: use --port")
