"""Bodies, queries and answers of the routes for feedback and files, as types; see `responses.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from lichen.adapters.files import StoredFile
from lichen.adapters.records import Entry, LessonKind, Rating, Record
from lichen.errors import RequestError
from lichen.runtime.http.schema import MAX_CHOICES, ChatMessage, explained

Q = TypeVar("Q", bound=Struct)

MAX_CORRECTION = 100_000  # characters

ResponseId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]
Tag = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:-]{1,64}$")]
Limit = Annotated[int, Meta(ge=1, le=100)]


class FeedbackBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/feedback`: what somebody says of one choice of a response.

    A further feedback on the same choice adds to the first; a field that it gives replaces the earlier one.
    With `messages` and `answer` a response needs not have been kept, and needs no id either; where it was
    kept, what lichen kept counts.
    """

    response_id: ResponseId | None = None
    choice: Annotated[int, Meta(ge=0, lt=MAX_CHOICES)] = 0
    rating: Rating | None = None
    correction: Annotated[str, Meta(min_length=1, max_length=MAX_CORRECTION)] | None = None
    tags: Annotated[list[Tag], Meta(max_length=16)] | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    answer: str | None = None
    model: Annotated[str, Meta(max_length=256)] | None = None

    def check(self) -> None:
        """Raise RequestError for fields that do not go together."""
        if self.rating is None and self.correction is None:
            raise RequestError("Give a rating, a correction or both.", param="rating")
        if (self.messages is None) != (self.answer is None):
            missing = "messages" if self.messages is None else "answer"
            raise RequestError(
                "messages and answer are only allowed together: what was asked, and what was answered.",
                param=missing,
            )
        if self.response_id is None and self.messages is None:
            raise RequestError(
                "The field response_id is required, unless messages and answer are given.",
                param="response_id",
            )
        if self.model is not None and self.messages is None:
            raise RequestError("model is only allowed with messages and answer.", param="model")


class FeedbackQuery(Struct, kw_only=True, forbid_unknown_fields=True):
    """Of a listing: the newest `limit` records after the one with the id `after`."""

    limit: Limit = 20
    after: str | None = None


class FeedbackObject(Struct, kw_only=True):
    """A record without its texts. Times are in seconds since 1970; `rated_at` is null until it is rated."""

    id: str
    object: Literal["feedback"]
    response_id: str
    choice: int
    model: str
    created_at: int
    rated_at: int | None
    rating: Rating | None
    corrected: bool
    tags: list[str]


class FeedbackRecord(FeedbackObject, kw_only=True):
    """A whole record. request: `messages` and `tools`, or `prompt`; answer: a message, or `text`."""

    correction: str | None
    request: dict[str, Any]
    answer: dict[str, Any]


class FeedbackList(Struct, kw_only=True):
    """Records of the key that asks, the newest first."""

    object: Literal["list"]
    data: list[FeedbackObject]
    has_more: bool


class FeedbackDeleted(Struct, kw_only=True):
    """A deletion that is done. tainted_adapters: digests of those that had learned from it."""

    id: str
    object: Literal["feedback.deleted"]
    deleted: Literal[True]
    tainted_adapters: list[str]


class FilesQuery(Struct, kw_only=True, forbid_unknown_fields=True):
    """Of a listing of files."""

    purpose: Literal["fine-tune"] | None = None
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None


class LessonCounts(Struct, kw_only=True):
    """lichen's own: what a file teaches."""

    kind: LessonKind
    train: int
    held_out: int
    duplicates: int


class FileObject(Struct, kw_only=True):
    """One file, checked. bytes: its size; created_at: seconds since 1970."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune"]
    status: Literal["processed"]
    lessons: LessonCounts


class FileList(Struct, kw_only=True):
    """Files of the key that asks."""

    object: Literal["list"]
    data: list[FileObject]
    has_more: bool
    first_id: str | UnsetType = UNSET
    last_id: str | UnsetType = UNSET


class FileDeleted(Struct, kw_only=True):
    """A file is gone. tainted_adapters: digests of those that had learned from it."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]
    tainted_adapters: list[str]


def feedback_object(entry: Entry) -> FeedbackObject:
    """A record as the API words it."""
    return FeedbackObject(**_worded(entry))


def feedback_record(record: Record) -> FeedbackRecord:
    """A whole record as the API words it."""
    return FeedbackRecord(
        **_worded(record), correction=record.correction, request=record.request, answer=record.answer
    )


def _worded(entry: Entry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "object": "feedback",
        "response_id": entry.response,
        "choice": entry.choice,
        "model": entry.model,
        "created_at": int(entry.created),
        "rated_at": None if entry.rated is None else int(entry.rated),
        "rating": entry.rating,
        "corrected": entry.corrected,
        "tags": list(entry.tags),
    }


def file_object(file: StoredFile) -> FileObject:
    """A file as the API words it."""
    return FileObject(
        id=file.id,
        object="file",
        bytes=file.size,
        created_at=file.created,
        filename=file.name,
        purpose="fine-tune",
        status="processed",
        lessons=LessonCounts(
            kind=file.kind, train=file.train, held_out=file.held_out, duplicates=file.duplicates
        ),
    )


def parse_query(values: Mapping[str, str], kind: type[Q]) -> Q:
    """A request's query as `kind`. Raises RequestError or UnsupportedField naming what is wrong."""
    try:
        return msgspec.convert(dict(values), kind, strict=False)
    except msgspec.ValidationError as error:
        raise explained(str(error)) from error
