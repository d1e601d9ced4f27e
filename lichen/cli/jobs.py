"""`lichen jobs`: what the daemon learns, how far it is, and wishes about it; also while no daemon runs."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lichen.cli.settings import config_of, table

if TYPE_CHECKING:
    from lichen.adapters.events import Event
    from lichen.adapters.jobs import Job, JobStore, Wish

LOOK_S = 0.3
PLOT_ROWS = 10
PLOT_COLUMNS = 60

JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of the job, or its beginning.")]


def register(app: typer.Typer) -> None:
    """Add the group."""
    jobs = typer.Typer(help="Jobs of learning: list them, watch them, let them wait or end.")
    jobs.command("list")(list_jobs)
    jobs.command()(show)
    jobs.command()(watch)
    jobs.command()(cancel)
    jobs.command()(pause)
    jobs.command()(resume)
    jobs.command()(remove)
    app.add_typer(jobs, name="jobs")


def list_jobs(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """All jobs, the newest first."""
    import msgspec

    store = _store(context)
    jobs = store.jobs()
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(jobs), indent=2))
        return
    if not jobs:
        typer.echo("No jobs yet. A client makes one through /v1/fine_tuning/jobs.", err=True)
    rows = [(job.id, job.status, f"{job.model}:{job.name}", _progress(store, job)) for job in jobs]
    if rows:
        table("", ("JOB", "STATE", "ADAPTER", "PROGRESS"), rows)
    said = store.folder.parent / "policy.json"  # of a daemon that learns by itself
    if said.exists():
        typer.echo(f"By itself: {msgspec.json.decode(said.read_bytes())['sentence']}", err=True)


def show(
    context: typer.Context,
    job: JobId,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the loss of all steps.")] = False,
) -> None:
    """One job: its state, its numbers, and what came of it."""
    from lichen.adapters.events import Measured, Settled, Stepped
    from lichen.runtime.http.fine_tuning_schema import message_of

    store = _store(context)
    found = _find(store, job)
    typer.echo(f"{found.id}  {found.status}  {found.model}:{found.name}  {_progress(store, found)}")
    if found.error:
        typer.echo(found.error)
    if found.outcome is not None:
        typer.echo(f"version {found.outcome.digest[:12]}: lichen adapters show {found.outcome.adapter}")
    events = _events(store, found)
    for event in events:
        if isinstance(event, Measured | Settled):
            typer.echo(message_of(event))
    losses = [event.loss for event in events if isinstance(event, Stepped)]
    if plot and losses:
        typer.echo(drawn(losses))


def watch(context: typer.Context, job: JobId) -> None:
    """Follow a job until it ends or waits. Ctrl-C stops watching, not the job."""
    from lichen.adapters.events import EventReader
    from lichen.adapters.launch import EVENTS
    from lichen.cli.learn import LearnDisplay

    store = _store(context)
    found = _find(store, job)
    reader = EventReader(store.place(found.id) / EVENTS, whole=True)
    try:
        with LearnDisplay() as display:
            while True:
                found = store.get(found.id)
                for event in reader.new():
                    display(event)
                if found.ended or found.status == "paused":
                    break
                time.sleep(LOOK_S)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    typer.echo(f"{found.status}{': ' + found.error if found.error else ''}", err=True)
    if found.status in ("failed", "cancelled"):
        raise typer.Exit(1)


def cancel(context: typer.Context, job: JobId) -> None:
    """End a job; what it has learned so far is dropped."""
    _ask(context, job, "cancel")


def pause(context: typer.Context, job: JobId) -> None:
    """Let a job wait, with a checkpoint."""
    _ask(context, job, "pause")


def resume(context: typer.Context, job: JobId) -> None:
    """Let a paused job go on."""
    _ask(context, job, "resume")


def remove(context: typer.Context, job: JobId) -> None:
    """Forget an ended job; the adapter that came of it stays."""
    store = _store(context)
    store.remove(_find(store, job).id)


def drawn(values: list[float]) -> str:
    """A curve as text: the mean of each stretch of steps, highest value at the top."""
    columns = min(PLOT_COLUMNS, len(values))
    edges = [index * len(values) // columns for index in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    step = (high - low) / (PLOT_ROWS - 1) or 1.0
    lines = []
    for row in reversed(range(PLOT_ROWS)):
        level = low + row * step
        marks = "".join("●" if round((mean - low) / step) == row else " " for mean in means)
        lines.append(f"{level:8.3f} │{marks}".rstrip())
    lines.append(f"{'':8} └{'─' * columns}")
    lines.append(f"{'':10}1{len(values):>{max(1, columns - 1)},}")
    return "\n".join(lines)


def _store(context: typer.Context) -> JobStore:
    from lichen.adapters.jobs import JobStore

    return JobStore(config_of(context).home / "learning" / "jobs")


def _find(store: JobStore, id: str) -> Job:
    """A job by its id or the beginning of it. Raises NotFound, and RequestError where there are several."""
    from lichen.errors import RequestError

    fitting = [job for job in store.jobs() if id and job.id.removeprefix("ftjob-").startswith(id)]
    fitting = fitting or [job for job in store.jobs() if id and job.id.startswith(id)]
    if len(fitting) > 1:
        raise RequestError(f"{len(fitting)} jobs begin with {id!r}.", hint="Write more of it.")
    return fitting[0] if fitting else store.get(id)


def _ask(context: typer.Context, id: str, wish: Wish) -> None:
    store = _store(context)
    job = store.ask(_find(store, id).id, wish)
    typer.echo(f"{job.id} is {job.status}{' and will ' + job.asked if job.asked else ''}.", err=True)


def _events(store: JobStore, job: Job) -> list[Event]:
    from lichen.adapters.events import told
    from lichen.adapters.launch import EVENTS

    return [one.event for one in told(Path(store.place(job.id)) / EVENTS)]


def _progress(store: JobStore, job: Job) -> str:
    """How far it is, in words."""
    from lichen.adapters.events import Started, Stepped
    from lichen.cli.learn import left_words

    events = _events(store, job)
    steps = next((event.steps for event in reversed(events) if isinstance(event, Started)), None)
    last = next((event for event in reversed(events) if isinstance(event, Stepped)), None)
    if steps is None or last is None:
        return job.error if job.status == "failed" else ""
    words = f"step {last.step} of {steps}, loss {last.loss:.3f}"
    if job.status == "running":
        words += f", {last.tokens_per_second:.0f} tokens/s, {left_words(last.left)} left"
    return words
