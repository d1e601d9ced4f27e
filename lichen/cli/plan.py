"""`lichen plan`: say what you want, and see how lichen would run a model on this machine, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import msgspec
import typer

from lichen.cli.inspect import AsJson
from lichen.cli.settings import Given, megabytes, table
from lichen.cli.texts import Stages, model_path

if TYPE_CHECKING:
    from lichen.devices.plan import Choice
    from lichen.devices.schedule import Progress
    from lichen.devices.verdict import Candidate
    from lichen.planning import Planned, Tell

Text = Optional[str]
ROWS = 12  # of the Pareto set that are shown
COLUMNS = tuple(
    [
        " ",
        "LAYOUT",
        "SLOTS",
        "THREADS",
        "BATCH",
        "CHUNK",
        "KV",
        "TTFT",
        "P95",
        "ITL",
        "TOK/S",
        "MEMORY",
        "CORE-S/TOK",
        "KL",
    ]
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(plan)


def plan(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="GGUF file, or a model in the store.")],
    intent: Annotated[
        Text,
        typer.Option(help="latency, throughput, memory, battery or balanced; several with commas."),
    ] = None,
    ttft: Annotated[Text, typer.Option(help="Most time to the first token, such as 300ms.")] = None,
    itl: Annotated[Text, typer.Option(help="Most time between two tokens, such as 40ms.")] = None,
    tokens_per_second: Annotated[Text, typer.Option(help="Least tokens a second of all users.")] = None,
    memory: Annotated[Text, typer.Option(help="Most memory of the process, such as 2GB.")] = None,
    quality: Annotated[Text, typer.Option(help="Least share of the predictions kept, such as 0.99.")] = None,
    users: Annotated[Text, typer.Option(help="People who ask at the same time.")] = None,
    pause: Annotated[Text, typer.Option(help="Time between an answer and the next question.")] = None,
    arrivals: Annotated[Text, typer.Option(help="Requests a second, instead of users.")] = None,
    prompt: Annotated[Text, typer.Option(help="Tokens of a prompt.")] = None,
    answer: Annotated[Text, typer.Option(help="Tokens of an answer.")] = None,
    shared: Annotated[Text, typer.Option(help="Tokens at the start of prompts that are cached.")] = None,
    repeats: Annotated[Text, typer.Option(help="How often a drafted token is right, 0 to 0.99.")] = None,
    layouts: Annotated[Text, typer.Option(help="Layouts to choose of, such as source,q8_0.")] = None,
    as_json: AsJson = False,
) -> None:
    """Choose how to run a model for what is wanted, from measurements of a few seconds."""
    from lichen.cli.fingerprint import digest_of, layout_names
    from lichen.devices.wish import wish
    from lichen.planning import Asked, given_settings, plan_for

    own = ("model", "intent", "layouts", "as_json")
    flags = {name: value for name, value in context.params.items() if name not in own and value is not None}
    wanted = wish(intent, {name.replace("_", "-"): str(value) for name, value in flags.items()})
    given: Given = context.obj
    effective = given.effective()
    path = model_path(context, model)
    asked = Asked(name=model, path=path, sha256=digest_of(path))
    with Stages() as stages:
        planned = plan_for(
            effective.config,
            asked,
            wanted,
            given=given_settings(effective),
            layouts=layout_names(layouts) if layouts else (),
            tell=teller(stages),
        )
    if as_json:
        typer.echo(as_record(planned))
        return
    show(planned)


def teller(stages: Stages) -> Tell:
    """A report of measuring for `plan_for`."""

    def tell(layout: str, now: Progress) -> None:
        stages(f"measuring {layout}", now.done, now.total, now.task.kind if now.task is not None else "")

    return tell


def show(planned: Planned) -> None:
    """A table, a picture, and reasons."""
    choice = planned.choice
    table("", COLUMNS, (row(one, one == choice.pick) for one in shown(choice)))
    typer.echo(picture(choice))
    for reason in planned.reasons:
        typer.echo(f"- {reason}")
    from lichen.devices.telling import settings

    flags = " ".join(
        f"--{name.replace('_', '-')} {value}" for name, value in settings(choice.pick.plan).items()
    )
    typer.echo(f"Settings: {flags}")
    if planned.wanted is not None:
        typer.echo(
            f"The layout {planned.wanted} is not made yet: `lichen serve --intent` makes it meanwhile."
        )


def shown(choice: Choice) -> list[Candidate]:
    """The pick and some of the Pareto set, spread over it, by time to the first token."""
    front = list(choice.front)
    step = max(1.0, len(front) / (ROWS - 1))
    chosen = {min(len(front) - 1, round(step * index)) for index in range(ROWS - 1)}
    chosen.add(front.index(choice.pick))
    return [front[index] for index in sorted(chosen)]


def row(one: Candidate, picked: bool) -> tuple[str, ...]:
    """A line of the table."""
    plan, found = one.plan, one.prediction
    return (
        "*" if picked else "",
        plan.layout,
        *(str(value) for value in (plan.slots, plan.threads, plan.batch, plan.chunk)),
        plan.kv_type,
        *(f"{1000 * value:,.0f} ms" for value in (found.ttft, found.ttft_p95)),
        f"{1000 * found.itl:.1f} ms",
        f"{found.rate:,.0f}",
        megabytes(found.memory),
        f"{found.work:.4f}",
        f"{found.kl:.2g}",
    )


def picture(choice: Choice, width: int = 64, height: int = 12) -> str:
    """The Pareto set as text: tokens a second to the right, time to the first token upwards (both by their
    logarithms), a letter for each layout, and * for the pick."""
    from math import log

    points = [(log(one.prediction.rate), log(one.prediction.ttft), one) for one in choice.front]
    rates, times = [x for x, _, _ in points], [y for _, y, _ in points]

    def place(value: float, among: list[float], size: int) -> int:
        low, high = min(among), max(among)
        return round((value - low) / (high - low) * (size - 1)) if high > low else 0

    cells = [[" "] * width for _ in range(height)]
    letters: dict[str, str] = {}
    for x, y, one in points:
        letter = letters.setdefault(one.plan.layout, "sabcdefgh"[min(len(letters), 8)])
        line, column = height - 1 - place(y, times, height), place(x, rates, width)
        if cells[line][column] != "*":
            cells[line][column] = "*" if one == choice.pick else letter
    found = [one.prediction for one in choice.front]
    top, bottom = max(one.ttft for one in found), min(one.ttft for one in found)
    low, high = min(one.rate for one in found), max(one.rate for one in found)
    body = "\n".join(f"|{''.join(line).rstrip()}" for line in cells)
    key = ", ".join(f"{letter} {layout}" for layout, letter in letters.items())
    return (
        f"first token after {1000 * top:,.0f} ms (top) to {1000 * bottom:,.0f} ms\n{body}\n+{'-' * width}\n"
        f" {low:,.0f} to {high:,.0f} tokens/s; {key}, * the pick"
    )


def as_record(planned: Planned) -> str:
    """All of it as JSON."""
    from lichen.devices.telling import settings

    return msgspec.json.format(
        msgspec.json.encode(
            {
                "pick": planned.choice.pick,
                "settings": settings(planned.choice.pick.plan),
                "wanted_layout": planned.wanted,
                "reasons": planned.reasons,
                "wish": planned.wish,
                "front": planned.choice.front,
            }
        ),
        indent=2,
    ).decode()
