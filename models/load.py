"""From a GGUF to a torch model: the family is the file in `families/` with the architecture's name."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from lichen.errors import ModelFileError
from lichen.models import families
from lichen.models.decoder import Decoder
from lichen.models.metadata import Metadata
from lichen.models.weights import Weights
from lichen.quant.gguf import GGUFFile, open_gguf


def supported() -> list[str]:
    """The architectures that have a family."""
    return sorted(module.name for module in pkgutil.iter_modules(families.__path__))


def load_model(path: Path) -> Decoder:
    """Map a GGUF and build its model over the mapped bytes; nothing of the matrices is read yet.

    Raises ModelFileError for an unsound file, an architecture without a family, metadata of the wrong
    type, a missing or surplus tensor, or a shape that is not what the metadata promises.
    """
    return build_model(open_gguf(path))


def build_model(file: GGUFFile) -> Decoder:
    """The same over an opened file."""
    name = file.path.name
    metadata, weights = Metadata(file.metadata, name), Weights(file)
    if metadata.architecture not in supported():
        raise ModelFileError(
            f"{name} is of the architecture {metadata.architecture!r}, which lichen cannot train.",
            hint=f"It can train {', '.join(supported())}.",
        )
    family = importlib.import_module(f"{families.__name__}.{metadata.architecture}")
    model: Decoder = family.build(metadata, weights)
    metadata.refuse_unread()
    weights.refuse_unused()
    return model
