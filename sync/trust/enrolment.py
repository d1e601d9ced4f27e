"""The enrolment bundle: one file that gives a device its first trust, from a person's hands.

It holds a root of trust, so it must come on a way that is trusted (a stick, an image, a managed install), or
its fingerprint must be compared on one.
"""

from __future__ import annotations

import hashlib
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from lichen.errors import FleetError
from lichen.sync.manifest import Name, Words
from lichen.sync.trust.fetching import check_mirror

LIMIT = 1 << 20  # bytes of a bundle
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Enrolment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """fleet: its name. root: metadata of the root role, base64 in JSON. mirrors: URLs, tried in turn.

    tags: what this device is to the fleet, such as {"site": "oslo"}; rollouts ask for them.
    collector: URL that reports go to, if any. token: lets a device join there.
    """

    format: Annotated[int, Meta(ge=1, le=1)] = 1
    fleet: Name
    root: Annotated[bytes, Meta(min_length=2)]
    mirrors: Annotated[tuple[str, ...], Meta(min_length=1, max_length=32)]
    tags: Annotated[dict[Name, Words], Meta(max_length=64)] = {}
    collector: Annotated[str, Meta(max_length=2048)] | None = None
    token: Annotated[str, Meta(min_length=16, max_length=200)] | None = None

    @property
    def fingerprint(self) -> str:
        """sha256 of the root metadata in hex: what two people compare over the telephone."""
        return hashlib.sha256(self.root).hexdigest()


def read_enrolment(data: bytes) -> Enrolment:
    """A bundle from its bytes. Raises FleetError. Whether the root verifies is not looked at here."""
    if len(data) > LIMIT:
        raise FleetError(f"The enrolment bundle is larger than {LIMIT:,} bytes.")
    try:
        bundle = msgspec.json.decode(data, type=Enrolment)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FleetError(
            f"The enrolment bundle is malformed: {error}.", hint="Take a new copy from the fleet's publisher."
        ) from error
    for mirror in bundle.mirrors:
        check_mirror(mirror)
    if bundle.collector is not None:
        check_collector(bundle.collector)
    return bundle


def check_collector(url: str) -> str:
    """The URL, if reports may go there: https, or http to this machine. Raises FleetError."""
    parts = urlsplit(check_mirror(url))
    if parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK):
        return url
    raise FleetError(
        f"{url[:200]!r} cannot be a collector.", hint="Give an https: URL; http: only to this machine."
    )


def write_enrolment(bundle: Enrolment) -> bytes:
    """The bundle's bytes, laid out for reading."""
    return msgspec.json.format(msgspec.json.encode(bundle), indent=2) + b"\n"
