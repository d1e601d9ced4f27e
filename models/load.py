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
from lichen.quant import ggml
from lichen.quant.gguf import GGUFFile, open_gguf


def supported() -> list[str]:
    """The architectures that have a family."""
    return sorted(module.name for module in pkgutil.iter_modules(families.__path__))


def load_model(path: Path) -> Decoder:
    """Map a GGUF and build its model over the mapped bytes, whose numbers are checked.

    Raises ModelFileError for an unsound file, an architecture without a family, metadata of the wrong
    type, a missing or surplus tensor, a shape that is not what the metadata promises, or weights that are
    inf or nan.
    """
    file = open_gguf(path)
    model = build_model(file)
    _refuse_damaged(file)
    return model


def _refuse_damaged(file: GGUFFile) -> None:
    """Raises ModelFileError that names the tensor. Reads all of the file, at gigabytes a second."""
    for tensor in file.tensors.values():
        try:
            ggml.check_rows(tensor.type, tensor.data)
        except ModelFileError as error:
            raise ModelFileError(
                f"{file.path.name} cannot be used: {tensor.name}: {error.message}", hint=error.hint
            ) from error


def build_model(file: GGUFFile) -> Decoder:
    """The same over an opened file, of whose matrices nothing is read yet."""
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
