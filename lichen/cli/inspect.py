"""`lichen ps`, `lichen doctor`, `lichen config`: what runs, what is wrong, and what is set."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from lichen.cli.settings import Given, config_of, megabytes, table
from lichen.errors import LichenError, Unauthorized, Unavailable

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
    status = asyncio.run(daemon_status(config_of(context)))
    if as_json:
        typer.echo(json.dumps(status, indent=2))
        return
    slots, queue, kv = (status.get(key, {}) for key in ("slots", "queue", "kv"))
    counters = status.get("counters", {})
    rows: list[tuple[str, Any]] = [("state", status["state"]), ("process", status["pid"])]
    rows += [
        ("slots busy", f"{slots.get('busy', 0)} of {slots.get('total', 0)}"),
        ("waiting", f"{queue.get('waiting', 0)} of {queue.get('limit', 0)}"),
        ("KV cells", f"{kv.get('cells_used', 0)} of {kv.get('cells_total', 0)}"),
        ("answered", f"{counters.get('completed', 0)}, {counters.get('completion_tokens', 0)} tokens"),
        ("memory", megabytes(status["rss_bytes"])),
        ("up", f"{status['uptime_s']:.0f} s"),
    ]
    table("", ("WHAT", "NOW"), rows)
    typer.echo("")
    table(
        "",
        ("MODEL", "STATE", "CONTEXT", "MEMORY", "EXPECTED", "IDLE", "UNLOADS"),
        map(_row, status["models"]),
    )
    for model in status["models"]:
        if model["note"]:
            typer.echo(model["note"])


def _row(model: dict[str, Any]) -> tuple[Any, ...]:
    """One model for people."""
    slots, idle, expires = model["slots"].get("total", 0), model["idle_s"], model["expires_in_s"]
    loading = model["state"] == "loading"
    return (
        model["name"],
        f"loading {model['progress']:.0%}" if loading else model["state"],
        f"{slots} x {model['context']}" if slots else "",
        megabytes(model["measured_bytes"]),
        megabytes(model["estimate"].get("total", 0)),
        "in use" if idle is None else f"{idle:.0f} s",
        "pinned" if model["pinned"] else "never" if expires is None else f"in {expires:.0f} s",
    )


async def daemon_status(config: Config) -> dict[str, Any]:
    import httpx

    from lichen.cli.answering import daemon_client, refusal

    async with daemon_client(config) as client:
        try:
            answer = await client.get("/status", timeout=5)
            if answer.status_code != 200:
                raise refusal(answer.status_code, answer.content)
            body = answer.json()
            if not isinstance(body, dict) or "pid" not in body:
                raise ValueError("JSON, but not a status")
        except (httpx.HTTPError, ValueError) as error:
            where = config.uds or f"{config.host}:{config.port}"
            raise Unavailable(
                f"No lichen daemon answers at {where}.", hint="Start one: lichen serve"
            ) from error
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

    root = config.home / "store"
    if not _writable(root):
        yield Finding("store", "problem", f"{root} cannot be written to: mend its rights or set LICHEN_HOME")
        return
    store = Store(root, offline=config.offline)
    try:
        manifests = store.manifests()
        present = store.resolve(config.model)
    except LichenError as error:
        yield Finding("store", "problem", str(error))
        return
    begun = sum(path.stat().st_size for path in (root / "partial").glob("*.part"))
    yield Finding(
        "store",
        "fine",
        f"{len(manifests)} models, {megabytes(sum(m.size for m in manifests))}"
        + (f"; unfinished pulls hold {megabytes(begun)}: pull again to resume" if begun else ""),
    )
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


def _writable(path: Path) -> bool:
    """Whether files can be made in `path`, or where it would be made."""
    nearest = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def _port(config: Config) -> Finding:
    where = config.uds or f"{config.host}:{config.port}"
    try:
        state = asyncio.run(daemon_status(config))["state"]
        return Finding("daemon", "fine", f"runs at {where}, {state}")
    except Unauthorized as error:
        return Finding("daemon", "warning", f"runs at {where}: {error}")
    except LichenError:
        pass  # none of ours; the port may still be taken
    try:
        taken = config.uds is None and _somebody_listens(config.host, config.port)
    except OSError as error:
        return Finding(
            "daemon", "problem", f"{config.host} is no address here ({error.strerror}): use --host"
        )
    if taken:
        return Finding("daemon", "warning", f"another program has port {config.port}: use --port")
    return Finding("daemon", "fine", "none runs; start one with: lichen serve")


def _somebody_listens(host: str, port: int) -> bool:
    """Raises OSError for a host name that means nothing."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(address) == 0
