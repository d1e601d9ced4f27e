"""`lichen learn`: an adapter from a file of lessons, trained in a process of its own."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lichen.cli.settings import complete_model, config_of, megabytes, table
from lichen.errors import LessonError, RequestError

if TYPE_CHECKING:
    from lichen.adapters.events import Event, Finished, Measured
    from lichen.adapters.gate import Verdict
    from lichen.adapters.launch import Training
    from lichen.adapters.lessons import Report
    from lichen.adapters.task import Examples
    from lichen.adapters.versions import Version
    from lichen.config import Config

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(learn)


def learn(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Lessons as JSON lines, in the form of OpenAI's files.")],
    name: Annotated[str, typer.Option(help="Name of the adapter.")],
    validation: Annotated[
        Path | None, typer.Option(help="Lessons that only measure; without them, a part of FILE does.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model to adapt.", autocompletion=complete_model)] = None,
    epochs: Annotated[int, typer.Option(min=1, max=1000, help="Passes over the lessons.")] = 3,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.01, max=100_000, help="About how long to train; fewer epochs if need be."),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, max=1024, help="Size of the adapter.")] = 8,
    length: Annotated[
        int, typer.Option(min=16, max=1 << 17, help="Most tokens of an example; longer ones are left out.")
    ] = 1024,
    seed: Annotated[
        int, typer.Option(min=0, help="Decides the order of the lessons and the first numbers.")
    ] = 0,
    promote: Annotated[
        bool, typer.Option(help="Let the adapter serve if the gate finds it better; see `lichen adapters`.")
    ] = True,
) -> None:
    """Train an adapter. Ctrl-C keeps what is done; the same command then goes on."""
    from lichen.adapters.launch import Training, prepare
    from lichen.adapters.task import LoRAOptions, Task
    from lichen.api import model_options
    from lichen.runtime.learning import require_torch
    from lichen.sync.download import hash_file

    if not NAME.fullmatch(name):
        raise RequestError(f"{name!r} cannot be a name: use lower-case letters, digits, '.', '_' and '-'.")
    require_torch()
    config = config_of(context, model=model)
    report = _surveyed(file, validation)
    path = model_file(config)
    folder = config.home / "learning" / "jobs" / name
    task = Task(
        name=name,
        model=str(path.resolve()),
        output=str((folder / "result").resolve()),
        lessons=hash_file(file),
        lora=LoRAOptions(rank=rank, alpha=2.0 * rank),
        objective="preference" if report.kind == "preference" else "supervised",
        epochs=epochs,
        minutes=minutes,
        seed=seed,
        threads=model_options(config).threads,
        memory=_memory(),
    )
    examples = _examples(file, path, length, validation)
    prepare(folder, task, examples)
    events = _follow(Training(folder))
    if events is None:
        typer.echo("Stopped; the same command goes on from the last step.", err=True)
        raise typer.Exit(130)
    _result(events)
    _keep(config, name, path, Path(events[1].folder), examples, promote=promote)


def _surveyed(file: Path, validation: Path | None) -> Report:
    """Say what is in the files; the report of the first. Raises LessonError after listing what is wrong."""
    from lichen.adapters.lessons import survey

    report = survey(file)
    _require_sound(report)
    learned, measures = report.train, report.held_out
    if validation is not None:
        other = survey(validation)
        _require_sound(other)
        if (report.kind == "preference") != (other.kind == "preference"):
            raise LessonError(
                f"{file.name} holds lessons of the kind {report.kind} and {validation.name} of {other.kind}.",
                hint="Measure preference pairs with preference pairs.",
                param="validation",
            )
        learned, measures = report.lessons, other.lessons
    more = f", {report.duplicates:,} duplicates left out" if report.duplicates else ""
    typer.echo(f"{learned:,} lessons to learn, {measures:,} to measure with{more}.", err=True)
    return report


def _require_sound(report: Report) -> None:
    for fault in report.faults:
        typer.echo(str(fault), err=True)
    if report.fault_count:
        raise LessonError(
            f"{report.fault_count:,} of {report.lines:,} lines cannot be learned from.",
            hint="Mend or delete them.",
            param="file",
        )


def model_file(config: Config) -> Path:
    """The configured model's file, fetched if need be."""
    from lichen.api import local_file
    from lichen.cli.models import PullDisplay
    from lichen.sync.store import Store

    if (path := local_file(config.model)) is not None:
        return path
    store = Store(config.home / "store", offline=config.offline)
    with PullDisplay(sys.stderr) as display:
        manifest = store.resolve(config.model) or asyncio.run(store.pull(config.model, progress=display))
    return store.blob_path(manifest)


def _examples(file: Path, model: Path, length: int, validation: Path | None) -> Examples:
    from lichen.runtime.teaching import examples_of

    examples, left_out = examples_of(file, model, length, validation=validation)
    for sentence in left_out:
        typer.echo(sentence, err=True)
    return examples


def _memory() -> int:
    import psutil

    return int(0.8 * psutil.virtual_memory().available)


def _follow(training: Training) -> tuple[list[Measured], Finished] | None:
    """Show a training until it ends; None where it was stopped. Ctrl-C asks it to stop."""
    from lichen.adapters.events import Finished, Measured

    measured: list[Measured] = []
    finished: Finished | None = None
    with LearnDisplay() as display:
        while True:
            try:
                for event in training:
                    display(event)
                    if isinstance(event, Measured):
                        measured.append(event)
                    elif isinstance(event, Finished):
                        finished = event
                break
            except KeyboardInterrupt:
                training.stop()
    return None if finished is None else (measured, finished)


class LearnDisplay:
    """A bar with the loss and the time left on a terminal; elsewhere a line now and then."""

    def __enter__(self) -> LearnDisplay:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[more]}"))
        self._bar = Progress(*columns, console=Console(file=sys.stderr), transient=True)
        self._task = self._bar.add_task("measuring", total=None, more="")
        self._live = sys.stderr.isatty()
        self._steps = 0
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        from lichen.adapters.events import Started, Stepped

        if isinstance(event, Started):
            self._steps = event.steps
            again = f", going on at step {event.step}" if event.step else ""
            typer.echo(f"{event.steps:,} steps, {event.parameters:,} numbers to train{again}.", err=True)
            self._bar.update(self._task, total=event.steps, completed=event.step, description="training")
        elif isinstance(event, Stepped):
            speed = f"{event.tokens_per_second:.0f} tokens/s"
            words = f"loss {event.loss:.3f}  {speed}  {left_words(event.left)} left"
            self._bar.update(self._task, completed=event.step, more=words)
            if not self._live and (event.step == self._steps or event.step % max(1, self._steps // 10) == 0):
                typer.echo(f"step {event.step}/{self._steps}  {words}", err=True)


def left_words(seconds: float) -> str:
    """A time in words."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _result(events: tuple[list[Measured], Finished]) -> None:
    measured, finished = events
    before, after = measured[0], measured[-1]
    rows = [
        ("held-out loss", _number(before.loss), _number(after.loss)),
        ("held-out answers exact", _share(before.exact), _share(after.exact)),
        ("general loss", _number(before.general), _number(after.general)),
    ]
    table("", ("MEASURED", "BEFORE", "AFTER"), rows)
    typer.echo(f"{finished.seconds:.0f} s, at most {megabytes(finished.memory)} of memory.")


def _keep(config: Config, name: str, model: Path, place: Path, examples: Examples, *, promote: bool) -> None:
    """Put what was trained into the registry; the gate decides what stays there, and whether it serves."""
    import shutil

    from lichen.adapters.lineage import enter
    from lichen.adapters.registry import Registry

    registry = Registry(config.home / "adapters", limit=config.adapters_limit)
    version, half = enter(registry, name, place, model, base_name=config.model)
    shutil.rmtree(place, ignore_errors=True)  # the registry has it
    kept = _settle(config, version, half, model, examples, promote=promote)
    typer.echo(f"{name} has the version {kept[:12]} now.", err=True)
    typer.echo(str(registry.place(name, kept).parent))


def _settle(
    config: Config, version: Version, half: Version | None, model: Path, examples: Examples, *, promote: bool
) -> str:
    """Let the gate decide, and say what it found; the digest of what stays in the registry."""
    from lichen.adapters.gate import Limits
    from lichen.adapters.registry import Registry
    from lichen.api import model_options
    from lichen.cli.texts import Stages
    from lichen.errors import GateError
    from lichen.runtime.gating import settle

    registry = Registry(config.home / "adapters", limit=config.adapters_limit)
    by_hand = f"Let it serve all the same: lichen adapters promote {version.name}"
    try:
        with Stages() as stages:
            verdict = settle(
                registry,
                version,
                model,
                examples,
                Limits(gain=config.gate_gain, general=config.gate_general, earlier=config.gate_earlier),
                threads=model_options(config).threads,
                progress=stages,
                promote=promote,
                half=half,
            )
    except GateError as error:
        typer.echo(f"It does not serve: {error}", err=True)
        typer.echo(f"{by_hand} {version.digest[:12]}", err=True)
        return version.digest
    kept = verdict.kept
    if len(verdict.candidates) > 1:
        typer.echo(_compared(verdict), err=True)
    for fault in kept.faults:
        typer.echo(f"It does not serve: {fault}", err=True)
    if kept.faults or not promote:
        typer.echo(f"{by_hand} {kept.name[:12]}", err=True)
    else:
        typer.echo(f"It serves now as {config.model}:{version.name}.", err=True)
    return kept.name


def _compared(verdict: Verdict) -> str:
    """Which of a training's adapters is kept."""
    losses = {one.checkpoint: _number(one.numbers.loss) for one in verdict.candidates}
    when = "half of the steps" if verdict.kept.checkpoint == "half" else "all steps"
    both = f"held-out loss {losses['half']} after half, {losses['end']} after all"
    return f"The adapter after {when} is kept: {both}."


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
