"""What a trainer leaves behind, as the registry's lineage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from lichen.adapters.task import Manifest
from lichen.adapters.versions import Lineage
from lichen.errors import AdapterError

ADAPTER, MANIFEST = "adapter.gguf", "adapter.json"  # in the folder that a trainer names in `events.Finished`
PLACES = ("model", "output")  # of a task: paths, which say nothing about the adapter


def lineage_of(
    place: Path, *, base_name: str = "", lessons: Sequence[str] = (), parent: str | None = None
) -> Lineage:
    """Where a trained adapter comes from. place: the trainer's result. Raises AdapterError.

    lessons: ids of the journal's records and of files. parent: digest of the version that it goes on from.
    """
    try:
        manifest = msgspec.json.decode((place / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError) as error:
        raise AdapterError(f"{place} is no result of a training: {error}.") from None
    options = msgspec.to_builtins(manifest.task)
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
        },
        scores={"before": manifest.before, "after": manifest.after},
        parent=parent,
        lichen=manifest.lichen,
        torch=manifest.torch,
    )
