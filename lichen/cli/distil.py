"""`lichen distil`: the first draft head of a model, from its own answers to a file of prompts."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lichen.cli.learn import LearnDisplay, model_file
from lichen.cli.settings import complete_model, config_of, table
from lichen.errors import LessonError

if TYPE_CHECKING:
    from lichen.adapters.draft_head import DraftHead
    from lichen.adapters.events import Compared
    from lichen.runtime.served_model import ServedModel

WAVE = 16  # prompts after which what was answered is on the disk
SLOTS = 4
LONGEST = 1 << 20  # characters of a line
STATES_LIMIT = 2_000_000_000
BAR = 40  # characters

Messages = list[dict[str, Any]]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(distil)


def distil(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model that gets a head.", autocompletion=complete_model)],
    prompts: Annotated[
        Path, typer.Option(help="Questions: a text a line, or JSON with 'prompt' or 'messages'.")
    ],
    out: Annotated[Path | None, typer.Option(help="Also write the head to this file.")] = None,
    tokens: Annotated[int, typer.Option(min=1, max=8192, help="Most tokens of an answer.")] = 200,
    minutes: Annotated[float, typer.Option(min=0.01, max=100_000, help="About how long to train.")] = 10.0,
    steps: Annotated[int, typer.Option(min=1, max=1 << 20, help="Most steps of the training.")] = 4000,
) -> None:
    """Make a draft head for a model. Ctrl-C keeps what is done; the same command then goes on."""
    from lichen.adapters.distil_task import DistilTask
    from lichen.adapters.launch import DISTIL, Training, prepare
    from lichen.adapters.states import segment_files
    from lichen.api import model_options
    from lichen.runtime.learning import require_torch
    from lichen.runtime.speculation.heads import head_folder
    from lichen.sync.download import hash_file

    require_torch()
    config = config_of(context, model=model)
    asked = read_prompts(prompts)
    path = model_file(config).resolve()
    base = hash_file(path)
    folder = head_folder(config.home, base)
    job = folder / "first" / f"{hash_file(prompts)[:16]}-{tokens}"
    threads = model_options(config).threads
    step_s = asyncio.run(_collect(path, asked, job, tokens, threads))
    output = job / "new.head.gguf"
    states = job / "states"
    task = DistilTask(
        model=str(path),
        base=base,
        states=str(states),
        segments=tuple(segment.name for segment in segment_files(states)),
        output=str(output),
        steps=steps,
        minutes=minutes,
        threads=threads,
        step_s=step_s,
    )
    prepare(job / "training", task)
    followed = follow(Training(job / "training", DISTIL))
    if followed is None:
        typer.echo("Stopped; the same command goes on from the last step.", err=True)
        raise typer.Exit(130)
    compared, losses = followed
    place = _keep(path, folder, output, base, out)
    show(compared, losses)
    typer.echo(str(place))


def read_prompts(path: Path) -> list[Messages]:
    """A conversation a line that ends where the model is to answer. Raises LessonError for a bad line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LessonError(f"{path} cannot be read as text: {error}.", param="prompts") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_prompt(line))
            except (ValueError, TypeError, AttributeError, RecursionError):
                raise LessonError(
                    f"Line {number} of {path.name} is no prompt.",
                    hint="Give a text, or JSON with 'prompt' or 'messages'.",
                    param="prompts",
                ) from None
    if not found:
        raise LessonError(f"{path.name} has no prompts.", param="prompts")
    return found


def _prompt(line: str) -> Messages:
    if len(line) > LONGEST:
        raise ValueError
    if not line.lstrip().startswith("{"):
        return [{"role": "user", "content": line.strip()}]
    entry = json.loads(line)
    prompt = entry.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    messages = entry.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise TypeError
    asked = max((at for at, message in enumerate(messages, 1) if message["role"] != "assistant"), default=0)
    if not asked:
        raise ValueError
    return [{"role": message["role"], "content": message["content"]} for message in messages[:asked]]


async def _collect(path: Path, asked: list[Messages], job: Path, tokens: int, threads: int) -> float:
    """Have the model answer what it has not answered yet; seconds that a step takes alone."""
    from rich.progress import Progress

    from lichen.quant.gguf_check import check_gguf
    from lichen.runtime.served_model import ModelOptions, ServedModel
    from lichen.runtime.speculation.build import SpeculationOptions

    done = 0
    with suppress(OSError, ValueError):
        done = min(len(asked), int((job / "answered").read_text(encoding="ascii")))
    check_gguf(path)
    options = ModelOptions(
        context=2048,
        slots=SLOTS,
        threads=threads,
        speculation=SpeculationOptions(states=job / "states", distil_limit=STATES_LIMIT),
    )
    load = asyncio.to_thread(ServedModel.load, path, name="model", sha256="", options=options)
    served = await load
    try:
        with Progress(transient=True) as bar:
            shown = bar.add_task("answering", total=len(asked), completed=done)
            for at in range(done, len(asked), WAVE):
                wave = asked[at : at + WAVE]
                await asyncio.gather(*(_answer(served, messages, tokens) for messages in wave))
                await asyncio.to_thread(served.flush_states)
                (job / "answered").write_text(str(at + len(wave)), encoding="ascii")
                bar.update(shown, completed=at + len(wave))
        timings = await _answer(served, asked[0], 32, kept=False)
        return 1.0 / max(timings, 1e-3)
    finally:
        await asyncio.to_thread(served.close)


async def _answer(served: ServedModel, messages: Messages, tokens: int, *, kept: bool = True) -> float:
    """Tokens a second. A prompt that the model cannot take is left out."""
    from lichen.errors import RequestError
    from lichen.runtime.sequence import SamplingOptions

    try:
        options = SamplingOptions(temperature=0, max_tokens=tokens)
        (generation,) = await served.chat(messages, options, kept=kept)
    except RequestError as error:
        typer.echo(f"A prompt is left out: {error}", err=True)
        return 0.0
    await generation.text()
    return generation.finished.timings.tokens_per_second if generation.finished else 0.0


def _keep(path: Path, folder: Path, output: Path, base: str, out: Path | None) -> Path:
    """Serve the new head from now on; where it lies."""
    from lichen.adapters.distil_task import model_sizes
    from lichen.adapters.draft_head import write_head
    from lichen.runtime.speculation.heads import HeadStore

    hidden, vocabulary = model_sizes(path)
    store = HeadStore(folder, base=base, vocabulary=vocabulary, hidden=hidden)
    head: DraftHead = store.read(output)
    version = store.add(head)
    if out is not None:
        write_head(out, head)
    return out or store.path(version)


def follow(training: Any) -> tuple[Compared, list[float]] | None:
    """Show a training until it ends; None where it was stopped. Ctrl-C asks it to stop."""
    from lichen.adapters.events import Compared, Stepped

    compared: Compared | None = None
    losses: list[float] = []
    with LearnDisplay() as display:
        while True:
            try:
                for event in training:
                    display(event)
                    if isinstance(event, Stepped):
                        losses.append(event.loss)
                    elif isinstance(event, Compared):
                        compared = event
                break
            except KeyboardInterrupt:
                training.stop()
    return None if compared is None else (compared, losses)


def show(compared: Compared, losses: list[float]) -> None:
    """Acceptance by position as bars, and the loss as a line of blocks."""
    grade = compared.new
    rows = [
        (str(position), f"{share:.1%}", "█" * round(BAR * share))
        for position, share in enumerate(grade.acceptance, 1)
    ]
    table("", ("POSITION", "RIGHT", ""), rows)
    typer.echo(f"loss  {sparkline(losses)}")
    typer.echo(f"{grade.guess_s * 1e3:.2f} ms a guess, measured on {grade.drafts:,} held-out places.")


def sparkline(values: list[float]) -> str:
    """Values as a line of BAR blocks at most, each the mean of its part, the highest value full."""
    blocks = "▁▂▃▄▅▆▇█"
    count = min(BAR, len(values))
    parts = [values[len(values) * at // count : len(values) * (at + 1) // count] for at in range(count)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means, default=0.0), max(means, default=1.0)
    return "".join(
        blocks[min(7, int(8 * (mean - low) / (high - low))) if high > low else 0] for mean in means
    )
