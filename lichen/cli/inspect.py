"""`lichen ps`, `lichen config`: what runs, and what is set."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lichen.cli.settings import Given, config_of, megabytes, table
from lichen.errors import Unavailable

if TYPE_CHECKING:
    from lichen.config import Config

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(ps)
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
