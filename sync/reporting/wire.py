"""What a device and a collector say to each other: the documents, their bounds, and what is signed.

    POST /v1/devices    Joining: this key is a device of the fleet
    POST /v1/reports    Batch: what became of updates

Both bodies are JSON and signed as they are by the device's Ed25519 key (RFC 8032), in the header SIGNATURE,
after a line that says what is signed: a signature for one purpose is none for another. No field holds free
words of a device: a report cannot carry a prompt, an answer or a path.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from lichen.errors import FleetError
from lichen.sync.manifest import Name, Sha256
from lichen.sync.rollout import Hardware, Share, Tags
from lichen.sync.updates.states import Cause, State

SIGNATURE = "Lichen-Signature"
DEVICE = "Lichen-Device"
BODY_LIMIT = 1 << 18  # bytes
BATCH = 200  # reports in one body
Purpose = Literal["join", "report"]

Sequence = Annotated[int, Meta(ge=1, le=1 << 52)]  # room for the milliseconds of 140,000 years
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
Moment = Annotated[float, Meta(ge=0, le=1e11)]  # seconds since 1970
Rate = Annotated[float, Meta(ge=0, le=1e9)]  # tokens a second
Slot = Annotated[str, Meta(pattern=r"^[a-z]{1,16}/[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")]
Version = Annotated[str, Meta(pattern=r"^[0-9A-Za-z.+-]{0,40}\Z")]
Code = Annotated[str, Meta(pattern=r"^[a-z_]{0,64}\Z")]

Document = TypeVar("Document", bound=Struct)


class UpdateReport(Struct, frozen=True, kw_only=True):
    """Where an update stands at a time of the device's clock.

    slot: what is used, such as "models/support". target, sha256: the version. code: of the error that ended
    it. requests, errors: served with the version since it is active. rate: tokens/s with it; rate_before:
    with the version before, on the same machine. quality: share of the health prompts that passed.
    """

    sequence: Sequence
    at: Moment
    slot: Slot
    target: Slot
    sha256: Sha256
    state: State
    cause: Cause = ""
    code: Code = ""
    requests: Count = 0
    errors: Count = 0
    rate: Rate | None = None
    rate_before: Rate | None = None
    quality: Share | None = None


class Batch(Struct, frozen=True, kw_only=True):
    """Reports of one device, oldest first. sent: its clock now. dropped: reports that it had no room for."""

    fleet: Name
    device: Sha256
    sent: Moment
    reports: Annotated[tuple[UpdateReport, ...], Meta(max_length=BATCH)]
    lichen: Version = ""
    hardware: Hardware = ""
    tags: Tags = {}
    dropped: Count = 0


class Joining(Struct, frozen=True, kw_only=True):
    """A device shows its key and the token of the enrolment bundle. key: 32 bytes, base64 in JSON."""

    fleet: Name
    token: Annotated[str, Meta(max_length=200)]
    key: Annotated[bytes, Meta(min_length=32, max_length=32)]


class Acknowledged(Struct, frozen=True, kw_only=True):
    """The answer: everything up to this sequence number is kept, or was before. new: of this batch."""

    sequence: Annotated[int, Meta(ge=0, le=1 << 52)]
    new: int = 0


def device_id(key: bytes) -> str:
    """A device's id: sha256 of its raw public key, in hex. Nobody can have an id without its key."""
    return hashlib.sha256(key).hexdigest()


def signed_bytes(purpose: Purpose, body: bytes) -> bytes:
    """What is signed for a body."""
    return b"lichen " + purpose.encode() + b" 1\n" + body


def signature_text(signature: bytes) -> str:
    """A signature as the header's value."""
    return base64.b64encode(signature).decode("ascii")


def read_signature(text: str) -> bytes:
    """The 64 bytes of the header's value. Raises FleetError."""
    try:
        signature = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        signature = b""
    if len(signature) != 64:
        raise FleetError("The signature is not 64 bytes in base64.")
    return signature


def read_document(body: bytes, kind: type[Document]) -> Document:
    """A document from its body. Raises FleetError."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FleetError(f"The {kind.__name__.lower()} is malformed: {str(error)[:200]}.") from error
