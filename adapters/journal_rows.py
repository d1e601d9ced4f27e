"""Rows of the journal's records as values, and the columns that they are read from."""

from __future__ import annotations

from typing import Any

import msgspec

from lichen.adapters.records import Entry, Rating, Record

ENTRY = (
    "id, owner, response, choice, created, source, kind, model, model_sha256, rated, rating, tags, "
    "correction IS NOT NULL"
)
RECORD = f"{ENTRY}, correction, request, answer, adapter, adapter_sha256"
RATINGS: dict[Rating | None, int | None] = {"up": 1, "down": -1, None: None}
_WORDS: dict[int | None, Rating | None] = {1: "up", -1: "down", None: None}


def entry_of(row: tuple[Any, ...]) -> Entry:
    """From the columns of ENTRY."""
    return Entry(**_fields(row))


def record_of(row: tuple[Any, ...]) -> Record:
    """From the columns of RECORD."""
    *entry, correction, request, answer, adapter, digest = row
    return Record(
        **_fields(tuple(entry)),
        correction=correction,
        request=msgspec.json.decode(request),
        answer=msgspec.json.decode(answer),
        adapter=adapter,
        adapter_sha256=digest,
    )


def _fields(row: tuple[Any, ...]) -> dict[str, Any]:
    fields = dict(zip(Entry.__struct_fields__, row, strict=True))
    return fields | {
        "rating": _WORDS[fields["rating"]],
        "tags": tuple(msgspec.json.decode(fields["tags"])),
        "corrected": bool(fields["corrected"]),
    }
