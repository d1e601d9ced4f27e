"""The packages of the extra `fleet`: imported where they are used, and named where they are missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lichen.errors import FleetError


@contextmanager
def of_the_extra() -> Iterator[None]:
    """Around imports of these packages. Raises FleetError that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise FleetError(
            f"Versions of a fleet need the package {error.name}, which is not installed.",
            hint="pip install 'lichen[fleet]'",
        ) from error
