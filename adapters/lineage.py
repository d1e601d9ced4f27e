"""What a trainer leaves behind: the adapters that compete at the gate, and the registry's lineage of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from lichen.adapters.registry import Registry
from lichen.adapters.task import Checkpoint, Manifest
from lichen.adapters.versions import Lineage, Version
from lichen.errors import AdapterError

ADAPTER, MANIFEST = "adapter.gguf", "adapter.json"  # in the folder that a trainer names in `events.Finished`
MIDDLE = "middle.gguf"  # beside them where nothing was pruned: after half of the steps
PLACES = ("model", "output")  # of a task: paths, which say nothing about the adapter


def candidates(place: Path) -> dict[Checkpoint, Path]:
    """The files of a trainer's result that may become a version, that of the end last."""
    files: dict[Checkpoint, Path] = {"half": place / MIDDLE, "end": place / ADAPTER}
    return {checkpoint: path for checkpoint, path in files.items() if path.exists() or checkpoint == "end"}


def enter(
    registry: Registry,
    name: str,
    place: Path,
    model: Path,
    *,
    base_name: str,
    lessons: Sequence[str] = (),
) -> tuple[Version, Version | None]:
    """Take a training's adapters into the registry: that of the end, and that of half of its steps.

    None for the latter where there is none, or no room for it. Raises what `Registry.add` raises.
    """
    found: dict[Checkpoint, Version] = {}
    for checkpoint, file in candidates(place).items():
        lineage = lineage_of(place, checkpoint, base_name=base_name, lessons=lessons)
        found[checkpoint] = registry.add(name, file, lineage, model=model)
    end, half = found["end"], found.get("half")
    if half is not None and (half.digest == end.digest or not registry.place(name, half.digest).exists()):
        half = None
    return end, half


def lineage_of(
    place: Path,
    checkpoint: Checkpoint = "end",
    *,
    base_name: str = "",
    lessons: Sequence[str] = (),
    parent: str | None = None,
) -> Lineage:
    """Where one of a training's adapters comes from. place: the trainer's result. Raises AdapterError.

    What the training measured in the end says nothing about the one after half of the steps.
    lessons: ids of the journal's records and of files. parent: digest of the version that it goes on from.
    """
    try:
        manifest = msgspec.json.decode((place / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError) as error:
        raise AdapterError(f"{place} is no result of a training: {error}.") from None
    options, half = msgspec.to_builtins(manifest.task), checkpoint == "half"
    return Lineage(
        base=manifest.base,
        base_name=base_name,
        lessons=tuple(lessons),
        lessons_sha256=manifest.task.lessons,
        options={
            **{key: value for key, value in options.items() if key not in PLACES},
            "first": manifest.first,
            "steps": manifest.steps,
            "rate": manifest.rate,
            **({"taken": manifest.middle} if half else {}),
        },
        scores={"before": manifest.before, **({} if half else {"after": manifest.after})},
        parent=parent,
        lichen=manifest.lichen,
        torch=manifest.torch,
    )
