"""`lichen adapters`: the versions of each adapter, and which of them serves; the daemon may run meanwhile."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lichen.cli.settings import complete_model, config_of, megabytes, table
from lichen.errors import NotFound, RequestError

if TYPE_CHECKING:
    from lichen.adapters.registry import Registry
    from lichen.adapters.versions import Standing, Version
    from lichen.runtime.lives import Life

EMPTY = "There are no adapters yet; docs/guides/adapters.md says where they come from."
SHOWN = 12  # digits of a digest
STEPS = {"half": "half of the steps", "end": "all steps"}
BAR = 32  # letters of the longest bar

adapters = typer.Typer(
    help="Versions of adapters, and which of them serves.", no_args_is_help=True, rich_markup_mode=None
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="Name of the adapter.")]
Digest = Annotated[str, typer.Argument(help="Digest of the version, or its first digits.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(adapters, name="adapters")


def _registry(context: typer.Context) -> Registry:
    """The registry of the home, after what was forgotten since has been marked in it."""
    from lichen.adapters.registry import Registry

    config = config_of(context)
    registry = Registry(config.home / "adapters", limit=config.adapters_limit)
    journal = config.home / "learning" / "journal.db"
    if journal.exists() and registry.names():
        from contextlib import closing

        from lichen.adapters.journal import Journal

        with closing(Journal.open(journal, limit=config.journal_limit)) as opened:
            registry.taint(tainted.adapter for tainted in opened.tainted())
    return registry


@adapters.command("list")
def list_adapters(context: typer.Context, as_json: AsJson = False) -> None:
    """List all adapters with the version that serves."""
    import msgspec

    registry = _registry(context)
    found = {name: (registry.standing(name), registry.versions(name)) for name in registry.names()}
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(found), indent=2))
        return
    if not found:
        typer.echo(EMPTY)
        return
    rows = [
        (
            name,
            _short(standing.active),
            len(versions),
            megabytes(sum(version.size for version in versions)),
            versions[-1].lineage.base_name or _short(standing.base),
            "tainted" if standing.active in standing.tainted else "",
        )
        for name, (standing, versions) in found.items()
    ]
    table("", ("NAME", "SERVES", "VERSIONS", "SIZE", "MODEL", ""), rows)


@adapters.command()
def show(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Show the versions of an adapter: where they come from, what they were measured to do, how they did."""
    import msgspec

    from lichen.adapters.versions import BASE

    registry = _registry(context)
    standing, versions = registry.standing(name), registry.versions(name)
    notes = {version.digest: registry.notes(name, version.digest) for version in versions}
    lives = _lives(context, registry, name)
    if as_json:
        whole = {"standing": standing, "versions": versions, "notes": notes, "lives": lives}
        typer.echo(json.dumps(msgspec.to_builtins(whole), indent=2))
        return
    table(
        f"{name}, for the model {versions[-1].lineage.base_name or standing.base}",
        ("VERSION", "", "WHEN", "SIZE", "LAYERS", "RANK", "LESSONS"),
        [
            (
                _short(version.digest),
                _state(standing, version),
                _when(version.created),
                megabytes(version.size),
                *version.parameters,
                len(version.lineage.lessons) or "-",
            )
            for version in versions
        ],
    )
    for version in versions:
        for when, what, values in _facts(version, notes[version.digest]):
            typer.echo(f"{_short(version.digest)}  {when}  {what}: {values}")
        for note in notes[version.digest]:
            if note.kind == "gate" and "decision" in note.values:
                typer.echo("\n".join(gate_picture(note.values)))
        if version.digest in lives:
            typer.echo(f"{_short(version.digest)}  {life_words(lives[version.digest])}")
    if BASE in lives:
        typer.echo(f"the model alone  {life_words(lives[BASE])}")


def _lives(context: typer.Context, registry: Registry, name: str) -> dict[str, Life]:
    """What was lived with each version that answered, by digest, with what people said of its answers."""
    from contextlib import closing

    import msgspec

    from lichen.adapters.journal import Journal
    from lichen.adapters.versions import BASE
    from lichen.runtime.lives import Life, Lives

    lives = Lives(registry.folder).of(name)
    config = config_of(context)
    path = config.home / "learning" / "journal.db"
    if path.exists():
        with closing(Journal.open(path, limit=config.journal_limit)) as journal:
            for digest in {BASE, *(version.digest for version in registry.versions(name))}:
                up, down = journal.ratings(name, digest)
                if up or down or digest in lives:
                    life = lives.get(digest, Life())
                    lives[digest] = msgspec.structs.replace(
                        life, lived=msgspec.structs.replace(life.lived, up=up, down=down)
                    )
    return lives


def life_words(life: Life) -> str:
    """What was lived, on one line: loss in nats a token, as the model itself expected what it said."""
    lived = life.lived
    words = [f"{life.answers:,} answers", f"{life.tokens:,} tokens"]
    if lived.answers:
        words.append(f"loss {lived.loss / lived.answers:.3f}")
    if lived.drafted:
        words.append(f"{lived.accepted / lived.drafted:.0%} of drafts right")
    if lived.up or lived.down:
        words.append(f"{lived.up:,} liked, {lived.down:,} disliked")
    when = f"  {_when(life.until)}" if life.answers else ""
    return f"lived{when}: {', '.join(words)}"


def gate_picture(verdict: dict[str, Any]) -> list[str]:
    """What a gate (`gate.Verdict`) measured before and after, a bar each, and what stood in the way."""
    judged = _kept(verdict)
    before, after = verdict["before"], judged["numbers"]
    rows = [
        ("loss on the lesson", before["loss"], after["loss"]),
        ("exact answers of it", before["exact"], after["exact"]),
        ("loss on general answers", before["general"], after["general"]),
        *(
            (f"loss on {name}", loss, after["earlier"][name][0])
            for name, (loss, _) in before["earlier"].items()
        ),
    ]
    lines = []
    for what, old, new in rows:
        largest = max(old or 0.0, new or 0.0) or 1.0
        for when, value in (("before", old), ("after", new)):
            if value is not None:
                label = what if when == "before" else ""
                lines.append(
                    f"  {label:24} {when:6} {value:8.3f} {'█' * round(BAR * value / largest)}".rstrip()
                )
    others = [one for one in verdict["candidates"] if one is not judged]
    for other in others:
        loss = other["numbers"]["loss"]
        shown = "no number" if loss is None else f"{loss:.3f}"
        lines.append(f"  loss on the lesson after {STEPS[other['checkpoint']]}, which was not kept: {shown}")
    return lines + [f"  {fault}" for fault in judged["faults"]]


def _kept(verdict: dict[str, Any]) -> dict[str, Any]:
    """The candidate that a verdict is about, as `gate.Verdict.kept`; older verdicts have one."""
    candidates: list[dict[str, Any]] = verdict["candidates"]
    chosen = [one for one in candidates if one["name"] == verdict["chosen"]]
    return (chosen or [one for one in candidates if one.get("checkpoint", "end") == "end"])[0]


def _facts(version: Version, notes: list[Any]) -> list[tuple[str, str, str]]:
    scores = version.lineage.scores.items()
    facts = [(_when(version.created), f"measured {what}", values) for what, values in scores]
    facts += [(_when(note.at), note.kind, note.values) for note in notes]
    return [(when, what, _words(values)) for when, what, values in facts]


def _words(values: Any) -> str:
    """Numbers of a measurement on one line; what is long is left to --json."""
    if not isinstance(values, dict):
        return str(values)
    short = {key: value for key, value in values.items() if not isinstance(value, dict | list)}
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in short.items()
    )


@adapters.command()
def promote(
    context: typer.Context,
    name: Name,
    digest: Annotated[str | None, typer.Argument(help="Version; the newest one if none is given.")] = None,
    tainted: Annotated[
        bool, typer.Option("--tainted", help="Even if it learned from what was forgotten since.")
    ] = False,
) -> None:
    """Let a version serve from the next request on; running answers keep theirs."""
    registry = _registry(context)
    version = registry.promote(name, digest or registry.versions(name)[-1].digest, tainted=tainted)
    typer.echo(f"{name} serves {_short(version.digest)}.")


@adapters.command()
def rollback(context: typer.Context, name: Name) -> None:
    """Let the version before serve again, or the model alone where none was."""
    version = _registry(context).rollback(name, reason="by hand")
    typer.echo(f"{name} serves {'the model alone' if version is None else _short(version.digest)}.")


@adapters.command()
def diff(context: typer.Context, name: Name, a: Digest, b: Digest, as_json: AsJson = False) -> None:
    """Compare two versions: lessons, options, scores, and how far each layer has moved."""
    import msgspec

    found = _registry(context).diff(name, a, b)
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(found), indent=2))
        return
    typer.echo(f"Lessons: {len(found.lessons_added):,} added, {len(found.lessons_removed):,} removed.")
    changed = [(key, *pair) for key, pair in {**found.options, **found.scores}.items()]
    if changed:
        table("", ("CHANGED", _short(a), _short(b)), changed)
    rows = [
        (layer.layer.removesuffix(".weight"), _norm(layer.a), _norm(layer.b), _norm(layer.distance))
        for layer in found.layers
    ]
    table("", ("LAYER", f"NORM {_short(a)}", f"NORM {_short(b)}", "DISTANCE"), rows)


@adapters.command("export")
def export_adapter(
    context: typer.Context,
    name: Name,
    path: Annotated[Path, typer.Argument(help="File to write (GGUF), or folder (PEFT).")],
    version: Annotated[str | None, typer.Option(help="Digest; the active version if none is given.")] = None,
    peft: Annotated[bool, typer.Option("--peft", help="As a folder that PEFT loads (safetensors).")] = False,
) -> None:
    """Copy a version out, for llama.cpp or for PEFT."""
    from lichen.adapters.peft_file import copy_out, write_peft

    registry = _registry(context)
    found = registry.version(name, version)
    if peft:
        file, base = registry.file(name, found.digest), found.lineage.base_name
        write_peft(file, path, heads=found.heads, base_name=base)
    else:
        copy_out(registry.file(name, found.digest), path)
    typer.echo(str(path))


@adapters.command("import")
def import_adapter(
    context: typer.Context,
    name: Name,
    path: Annotated[Path, typer.Argument(help="GGUF file, or folder that PEFT wrote (safetensors).")],
    model: Annotated[
        str | None, typer.Option(help="Model that it is for.", autocompletion=complete_model)
    ] = None,
) -> None:
    """Take an adapter in from elsewhere; `promote` lets it serve."""
    import tempfile

    from lichen.adapters.peft_file import read_peft
    from lichen.adapters.versions import Lineage

    registry = _registry(context)
    file, base, base_name = _model(context, model)
    lineage = Lineage(base=base, base_name=base_name, options={"imported": path.name})
    with tempfile.TemporaryDirectory() as folder:
        if path.is_dir():
            path = read_peft(path, Path(folder) / "adapter.gguf", model=file)
        version = registry.add(name, path, lineage, model=file)
    typer.echo(f"{name} has the version {_short(version.digest)} now; 'promote' lets it serve.")


@adapters.command()
def remove(
    context: typer.Context,
    name: Name,
    version: Annotated[str | None, typer.Option(help="Digest of one version.")] = None,
    all_versions: Annotated[bool, typer.Option("--all", help="The adapter, also if it serves.")] = False,
) -> None:
    """Delete a version, or the adapter with all of them."""
    if (version is None) != all_versions:
        raise RequestError("Say either which --version goes, or --all.")
    _registry(context).remove(name, version)
    typer.echo(f"Removed {name if version is None else f'{version} of {name}'}.")


def _model(context: typer.Context, model: str | None) -> tuple[Path, str, str]:
    """A model's file, its sha256 and its name. Raises NotFound: nothing is fetched for this."""
    from lichen.api import local_file
    from lichen.sync.download import hash_file
    from lichen.sync.store import Store

    config = config_of(context, model=model)
    if (path := local_file(config.model)) is not None:
        return path, hash_file(path), path.stem
    store = Store(config.home / "store", offline=True)
    manifest = store.resolve(config.model)
    if manifest is None:
        raise NotFound(f"The model {config.model!r} is not here.", hint=f"Get it: lichen pull {config.model}")
    return store.blob_path(manifest), manifest.sha256, manifest.name


def _state(standing: Standing, version: Version) -> str:
    words = ["serves"] if version.digest == standing.active else []
    return " ".join(words + (["tainted"] if version.digest in standing.tainted else []))


def _short(digest: str | None) -> str:
    return digest[:SHOWN] if digest else "-"


def _norm(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _when(moment: float) -> str:
    return datetime.datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M")
