"""What the journal holds, as values: answers that were kept, what people said of them, and listings."""

from __future__ import annotations

import secrets
import time
from typing import Any, Literal

import msgspec

Rating = Literal["up", "down"]
Kind = Literal["chat", "text"]  # of a record
LessonKind = Literal["chat", "completion", "preference"]

NOBODY = ""  # owner of what came without an API key


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """One answer to keep. owner: id of the API key that asked, or NOBODY.

    request: of a chat {"messages": [...], "tools": [...] if there were any}, of a text {"prompt": "..."}.
    answer: the assistant's message, or {"text": "..."}. source: "app" where a client says what was
    answered instead of this daemon knowing it. created: seconds since 1970. adapter: the name that was asked
    for, adapter_sha256: of what answered; "" for the model alone, None where that is not known, or where the
    adapter was used at another strength than its own.
    """

    owner: str
    response: str
    choice: int
    kind: Kind
    request: dict[str, Any]
    answer: dict[str, Any]
    model: str
    model_sha256: str = ""
    adapter: str | None = None
    adapter_sha256: str | None = None
    source: Literal["served", "app"] = "served"
    created: float = msgspec.field(default_factory=time.time)


class Opinion(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody said of an answer. None: not said, so that what was said before stays."""

    rating: Rating | None = None
    correction: str | None = None
    tags: tuple[str, ...] | None = None


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A record without its texts. Times are in seconds since 1970; rated: None until somebody rates it."""

    id: str
    owner: str
    response: str
    choice: int
    created: float
    source: Literal["served", "app"]
    kind: Kind
    model: str
    model_sha256: str
    rated: float | None
    rating: Rating | None
    tags: tuple[str, ...]
    corrected: bool


class Record(Entry, frozen=True, kw_only=True):
    """A whole record. adapter, adapter_sha256: as in `Kept`."""

    correction: str | None
    request: dict[str, Any]
    answer: dict[str, Any]
    adapter: str | None
    adapter_sha256: str | None


class Forgotten(msgspec.Struct, frozen=True):
    """What a deletion did: ids of records, and digests of the adapters that had learned from them."""

    ids: tuple[str, ...]
    adapters: tuple[str, ...]


class Tainted(msgspec.Struct, frozen=True):
    """An adapter that learned from something that was to be forgotten. lessons: how many of its are gone."""

    adapter: str
    since: float
    lessons: int


def new_id() -> str:
    """A record's id: random, so that none ever comes again and none tells how many there are."""
    return f"rec_{secrets.token_hex(10)}"
