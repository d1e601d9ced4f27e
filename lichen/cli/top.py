"""`lichen top`: what the daemon does right now, on one screen that follows it."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lichen.cli.inspect import daemon_status
from lichen.cli.settings import config_of, megabytes

if TYPE_CHECKING:
    from rich.console import RenderableType

Status = dict[str, Any]
COLUMNS = ("MODEL", "STATE", "SLOTS", "QUEUE", "TOK/S", "PROMPT/S", "DRAFTS", "TTFT", "KV", "MEMORY", "IDLE")
LEVELS = "▁▂▃▄▅▆▇█"  # eighths of drafted tokens that were right


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(top)


def top(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end, for pipes.")] = False,
    interval: Annotated[
        float, typer.Option(help="Seconds between two frames.", min=0.1, max=3600, metavar="SECONDS")
    ] = 1.0,
) -> None:
    """Watch the running daemon: models, slots, queue, speed, memory. Ctrl-C ends it."""
    from rich.console import Console
    from rich.live import Live

    config = config_of(context)

    def look() -> Sample:
        return Sample(asyncio.run(daemon_status(config)), time.monotonic())

    console = Console()
    before = look()
    if once:
        time.sleep(interval)
        console.print(frame(before, look()))
        return
    with Live(frame(before, before), console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            now = look()
            live.update(frame(before, now), refresh=True)
            before = now


class Sample:
    """One `/status` and when it was taken, in seconds of a steady clock."""

    def __init__(self, status: Status, taken_at: float) -> None:
        self.status = status
        self.taken_at = taken_at
        self.models: dict[str, Status] = {model["name"]: model for model in status["models"]}


def frame(before: Sample, now: Sample) -> RenderableType:
    """The screen: a line about the process, then a line for each model."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    status = now.status
    head = (
        f"lichen {status['version']}  {status['state']}  up {status['uptime_s']:.0f} s  "
        f"memory {megabytes(status['rss_bytes'])}, {megabytes(status['available_bytes'])} left"
    )
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
    seconds = now.taken_at - before.taken_at
    for name, model in now.models.items():
        table.add_row(*row(before.models.get(name), model, seconds))
    lines = [Text(line) for line in plan_lines(status.get("plan"))]
    drafts = [Text(line) for name, model in now.models.items() for line in draft_lines(name, model)]
    return Group(Text(head), *lines, Text(""), table, *drafts)


def draft_lines(name: str, model: Status) -> list[str]:
    """A curve of how many drafted tokens were right, a sign a minute up to now; nothing without drafts."""
    minutes = model.get("drafts") or []
    if not minutes:
        return []
    signs = [" "] * (1 + max(one["minutes_ago"] for one in minutes))
    for one in minutes:
        share = one["accepted"] / one["drafted"]
        signs[-1 - one["minutes_ago"]] = LEVELS[min(len(LEVELS) - 1, int(share * len(LEVELS)))]
    drafted, accepted = (sum(one[part] for one in minutes) for part in ("drafted", "accepted"))
    return [f"drafts of {name} by minute |{''.join(signs)}| {accepted / drafted:.0%} of {drafted:,} right"]


def plan_lines(plan: Status | None) -> list[str]:
    """What is planned, predicted and seen; nothing where there is no plan."""
    if plan is None:
        return []

    def figures(found: Status | None) -> str:
        if found is None:
            return "-"
        first = "-" if found["ttft"] is None else f"{1000 * found['ttft']:.0f} ms"
        return f"{found['rate']:.0f} tok/s, ttft {first}, {megabytes(found['memory'])}"

    lines = [
        f"plan {plan['intent']}: {plan['layout']}, {plan['slots']} slots, {plan['threads']} threads, "
        f"chunk {plan['chunk']}{', making ' + plan['making'] if plan['making'] else ''}",
        f"  predicted {figures(plan['predicted'])}   seen {figures(plan['seen'])}",
    ]
    if plan["changes"]:
        lines.append(f"  {plan['changes']} changes, the last since {plan['reason']}")
    return lines


def row(before: Status | None, model: Status, seconds: float) -> tuple[str, ...]:
    """One model's line; rates, the share of drafted tokens that were right, and the mean time to
    first token are of the time since `before`."""
    counters, past = model["counters"], (before or {}).get("counters", {})
    slots, queue, kv, idle = model["slots"], model["queue"], model["kv"], model["idle_s"]

    def grown(name: str) -> float:
        return max(0.0, float(counters.get(name, 0) - past.get(name, 0))) if past else 0.0

    def rate(tokens: float) -> str:
        return f"{tokens / seconds:.1f}" if seconds > 0 and past else "-"

    first, drafted = grown("first_tokens"), grown("draft_tokens")
    loading = model["state"] == "loading"
    return (
        model["name"],
        f"{model['progress']:.0%}" if loading else model["state"],
        f"{slots['busy']}/{slots['total']}" if slots else "-",
        str(queue["waiting"]) if queue else "-",
        rate(grown("completion_tokens")),
        rate(max(0.0, grown("prompt_tokens") - grown("cached_tokens"))),
        f"{grown('draft_accepted') / drafted:.0%}" if drafted else "-",
        f"{grown('ttft_s') / first * 1e3:.0f} ms" if first else "-",
        f"{kv['cells_used'] / kv['cells_total']:.0%}" if kv else "-",
        megabytes(model["measured_bytes"] or model["estimate"].get("total", 0)),
        "-" if idle is None else f"{idle:.0f} s",
    )
