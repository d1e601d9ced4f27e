"""One file that holds all of a training's state, replaced as a whole or not at all."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from lichen.durable import sync_folder
from lichen.errors import TrainingError

VERSION = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers and texts; durable when this returns. Raises TrainingError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            torch.save({"version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch wraps what the system said, and drops it
        partial.unlink(missing_ok=True)
        said = error.strerror if isinstance(error, OSError) else "the disk may be full"
        raise TrainingError(f"The checkpoint {path} cannot be written: {said}.") from error


def load(path: Path, identity: str) -> dict[str, Any] | None:
    """The state of this training, or None where there is none of it (none at all, or another's).

    Only tensors and plain values are read: a pickle that would run code is refused. Raises TrainingError
    for a file that is damaged or of a newer lichen.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True)
        version, found = state["version"], state["identity"]
    except (
        OSError,
        RuntimeError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        EOFError,
        LookupError,
    ) as error:
        raise TrainingError(
            f"The checkpoint {path} cannot be read.", hint="Delete it to start this training anew."
        ) from error
    except TypeError as error:
        raise TrainingError(f"{path} is no checkpoint.", hint="Delete it.") from error
    if version != VERSION:
        raise TrainingError(f"The checkpoint {path} has the version {version}; this lichen reads {VERSION}.")
    return dict(state) if found == identity else None
