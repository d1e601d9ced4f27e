"""A device's side of a fleet: first trust, refresh over mirrors, and targets that are what they claim.

    enrolment.json      the bundle that this device was enrolled with
    trusted             metadata that was verified (record.py)

Expired or unreachable metadata stops updates, never serving: nothing here touches what is installed.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lichen.durable import sync_folder, write_file
from lichen.errors import (
    FleetError,
    HashMismatch,
    ManifestError,
    MetadataExpired,
    NotFound,
    SourceError,
    TrustError,
)
from lichen.sync.download import check_space, hash_file, write_error
from lichen.sync.manifest import AnyManifest, read_manifest
from lichen.sync.pace import Pace
from lichen.sync.trust.enrolment import Enrolment, read_enrolment, write_enrolment
from lichen.sync.trust.fetching import CannotResume, Fetcher, TooLong, fetcher_for, read
from lichen.sync.trust.record import Record
from lichen.sync.trust.verification import Found, Standing, Verification, Walk, Wanted, standing

Result = TypeVar("Result")
Clock = Callable[[], datetime.datetime]


def utc_now() -> datetime.datetime:
    """The machine's clock."""
    return datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True, slots=True)
class FleetTarget:
    """A target that may be installed. file_name: below a mirror's `targets/`; sha256: hex; size: bytes."""

    manifest: AnyManifest
    sha256: str
    size: int
    file_name: str


@dataclass(frozen=True, slots=True)
class State:
    """Where this device stands. can_update: its metadata holds now. sentence: all of it for people."""

    enrolment: Enrolment
    standing: Standing
    can_update: bool
    sentence: str


async def follow(walk: Walk[Result], fetcher: Fetcher) -> Result:
    """Carry out a walk over one mirror; verification runs off the event loop. Raises what the walk raises."""

    results: list[Result] = []

    def step(data: bytes | None) -> Wanted | None:
        try:
            return walk.send(data)
        except StopIteration as done:  # which must not cross into a future
            results.append(done.value)
            return None

    wanted = await asyncio.to_thread(step, None)
    while wanted is not None:
        data: bytes | None
        try:
            data = await read(fetcher, f"metadata/{wanted.name}", wanted.limit)
        except NotFound:
            data = None
        wanted = await asyncio.to_thread(step, data)
    return results[0]


class Device:
    """This machine as a member of at most one fleet. folder: its state. clock: aware UTC times."""

    def __init__(self, folder: Path, *, clock: Clock = utc_now) -> None:
        self._folder = folder
        self._bundle = folder / "enrolment.json"
        self._record = Record(folder)
        self._clock = clock

    def enrol(self, data: bytes, *, fingerprint: str | None = None, replace: bool = False) -> Enrolment:
        """Take first trust from a bundle. fingerprint: what its root must have, in hex.

        Enrolling again in the same fleet keeps what is trusted; with `replace` it is forgotten.
        Raises FleetError, or TrustError for a root that does not verify.
        """
        bundle = read_enrolment(data)
        if fingerprint is not None and fingerprint.lower() != bundle.fingerprint:
            raise TrustError(f"The bundle's root has the fingerprint {bundle.fingerprint}, not that one.")
        standing({"root": bundle.root})
        if replace:
            self._record.forget()
        elif self._bundle.is_file() and (present := self.enrolment()).fleet != bundle.fleet:
            raise FleetError(
                f"This machine is in the fleet {present.fleet} already.", hint="Change it with --replace."
            )
        self._record.save(self._record.load() or {"root": bundle.root})
        try:
            write_file(self._bundle, write_enrolment(bundle), mode=0o600)
        except OSError as error:
            raise FleetError(f"{self._bundle} cannot be written: {error.strerror}.") from error
        return bundle

    def enrolment(self) -> Enrolment:
        """The bundle of this device. Raises FleetError if it is in no fleet."""
        try:
            data = self._bundle.read_bytes()
        except FileNotFoundError as error:
            raise FleetError(
                "This machine is in no fleet.", hint="Enrol it: lichen fleet enrol BUNDLE"
            ) from error
        except OSError as error:
            raise FleetError(f"{self._bundle} cannot be read: {error.strerror}.") from error
        return read_enrolment(data)

    def state(self) -> State:
        """Where this device stands, without the network. Raises FleetError or TrustError."""
        bundle, trusted, now = self.enrolment(), standing(self.trusted()), self._clock()
        expires = f"{trusted.expires:%Y-%m-%d %H:%M} UTC"
        if now >= trusted.expires:
            sentence = (
                f"The {trusted.expires_first} metadata of {bundle.fleet} expired on {expires}: this machine "
                "takes no updates until it finds newer metadata, and goes on serving what it has."
            )
        elif not trusted.complete:
            sentence = f"This machine is enrolled in {bundle.fleet} and has not fetched its metadata yet."
        else:
            sentence = f"This machine is up to date with {bundle.fleet}; its metadata holds until {expires}."
        return State(bundle, trusted, trusted.complete and now < trusted.expires, sentence)

    async def refresh(self, mirrors: Sequence[Fetcher] | None = None) -> Standing:
        """Bring trusted metadata up to date from the first mirror that can. Raises the last one's error."""

        async def nothing(_: Verification, __: Fetcher) -> None:
            return None

        await self._over_mirrors(nothing, mirrors)
        return standing(self.trusted())

    async def target(
        self, path: str, *, running: str, mirrors: Sequence[Fetcher] | None = None
    ) -> FleetTarget:
        """Refresh, then the target of this path, such as "adapters/support". running: this lichen's version.

        Raises NotFound, ManifestError, or TrustError when the wrong role vouches for it.
        """

        async def find(verification: Verification, mirror: Fetcher) -> Found | None:
            return await follow(verification.find(path), mirror)

        found = await self._over_mirrors(find, mirrors)
        if found is None:
            raise NotFound(f"The fleet {self.enrolment().fleet} has no target {path!r}.")
        return bind(found, running=running)

    async def listed(
        self, kind: str, *, running: str, mirrors: Sequence[Fetcher] | None = None
    ) -> list[FleetTarget]:
        """Refresh, then all targets of a kind that this lichen can read, by path. Raises as `refresh`."""

        async def find(verification: Verification, mirror: Fetcher) -> list[Found]:
            return await follow(verification.listed(kind), mirror)

        targets = []
        for found in await self._over_mirrors(find, mirrors):
            with suppress(ManifestError):  # of another kind or for a newer lichen: not for this machine
                targets.append(bind(found, running=running))
        return targets

    async def content(
        self, target: FleetTarget, limit: int, mirrors: Sequence[Fetcher] | None = None
    ) -> bytes:
        """The verified bytes of a small target. Raises TrustError, SourceError, HashMismatch."""
        if target.size > limit:
            raise TrustError(f"{target.manifest.path} has {target.size:,} bytes, more than {limit:,}.")

        async def from_one(mirror: Fetcher) -> bytes:
            data = await read(mirror, f"targets/{target.file_name}", target.size)
            if len(data) != target.size or hashlib.sha256(data).hexdigest() != target.sha256:
                raise HashMismatch(f"{mirror.address} sent other bytes for {target.manifest.path}.")
            return data

        return await self._first_that_can(from_one, mirrors)

    async def download(
        self,
        target: FleetTarget,
        destination: Path,
        mirrors: Sequence[Fetcher] | None = None,
        pace: Pace | None = None,
    ) -> None:
        """Fetch a target's plain file; `destination` appears only when it is whole and its hash is right.

        `bringing.py` is the way that fetches only what is missing.
        """

        async def from_one(mirror: Fetcher) -> None:
            await _download(mirror, target, destination, pace)

        await self._first_that_can(from_one, mirrors)

    async def _over_mirrors(
        self,
        then: Callable[[Verification, Fetcher], Awaitable[Result]],
        mirrors: Sequence[Fetcher] | None,
    ) -> Result:
        """Refresh from one mirror after the other until one succeeds; what each of them proved is kept."""

        async def from_one(mirror: Fetcher) -> Result:
            verification = Verification(self.trusted(), self._clock())
            try:
                await follow(verification.refresh(), mirror)
                return await then(verification, mirror)
            finally:
                await asyncio.to_thread(self._record.save, verification.remembered)

        async with self._locked():
            return await self._first_that_can(from_one, mirrors)

    async def _first_that_can(
        self, act: Callable[[Fetcher], Awaitable[Result]], mirrors: Sequence[Fetcher] | None
    ) -> Result:
        import httpx

        async with httpx.AsyncClient(follow_redirects=False, timeout=httpx.Timeout(20)) as client:
            chosen = mirrors or [fetcher_for(url, client) for url in self.enrolment().mirrors]
            failures: list[Exception] = []
            for mirror in chosen:
                try:
                    return await act(mirror)
                except (TrustError, MetadataExpired, SourceError, NotFound, HashMismatch) as error:
                    failures.append(error)
        raise failures[-1]

    @asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        """One process at a time moves trust forward; otherwise the slower one would move it back."""
        from filelock import FileLock, Timeout

        self.enrolment()  # looking makes no folder
        lock = FileLock(self._folder / "lock", thread_local=False)
        while True:
            try:
                lock.acquire(blocking=False)
                break
            except Timeout:
                await asyncio.sleep(0.05)
        try:
            yield
        finally:
            lock.release()

    def trusted(self) -> dict[str, bytes]:
        """The bytes of each role's metadata that is trusted now. Raises FleetError, TrustError."""
        trusted = self._record.load()
        return {"root": self.enrolment().root} if trusted is None else trusted


def bind(found: Found, *, running: str) -> FleetTarget:
    """A verified target as what it claims to be: the role, the path, the size and the manifest must agree.

    A target of kind adapters comes from the role adapters, or from one that adapters delegates to, and from
    no other: not even from the top-level targets role. Raises TrustError or ManifestError.
    """
    file = found.file
    custom = file.unrecognized_fields.get("custom")
    manifest = read_manifest(custom, running=running)
    if manifest.path != file.path:
        raise TrustError(f"The target {file.path!r} says that it is {manifest.path!r}.")
    if found.chain[1:2] != (manifest.kind,):
        raise TrustError(
            f"The role {found.role!r} vouches for {file.path!r}, which only the role {manifest.kind!r} may."
        )
    if manifest.size != file.length:
        raise TrustError(
            f"The target {file.path!r} has {file.length} bytes, but its manifest {manifest.size}."
        )
    if "sha256" not in file.hashes:
        raise TrustError(f"The target {file.path!r} has no sha256.")
    digest = file.hashes["sha256"]
    return FleetTarget(manifest, digest, file.length, found.names.get("sha256", file.path))


async def _download(mirror: Fetcher, target: FleetTarget, destination: Path, pace: Pace | None) -> None:
    """What came before it was cut off stays, and the next call goes on behind it, whoever sent it. Bytes that
    turn out wrong are fetched once more from the beginning, since another mirror may have sent the first."""
    partial = destination.with_name(f"{destination.name}.part")
    resumes = partial.is_file()
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            await _append(mirror, target, partial, pace)
        except CannotResume:
            partial.unlink()
            await _append(mirror, target, partial, pace)
        digest, size = await asyncio.to_thread(hash_file, partial), partial.stat().st_size
        if size == target.size and digest == target.sha256:
            partial.replace(destination)
            sync_folder(destination.parent)
            return
        partial.unlink()
    except TooLong:
        partial.unlink()
        raise
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise write_error(partial, error) from error
    if resumes:
        return await _download(mirror, target, destination, pace)
    raise HashMismatch(
        f"{mirror.address} sent {size:,} bytes with sha256 {digest} for "
        f"{target.manifest.path}, not the {target.size:,} bytes that the fleet signed."
    )


async def _append(mirror: Fetcher, target: FleetTarget, partial: Path, pace: Pace | None) -> None:
    """Bring what is missing behind the bytes that are here."""
    here = _size(partial)
    if here >= target.size > 0:  # whole, or nonsense: its hash decides
        return
    check_space(partial.parent, target.size - here)
    with partial.open("ab") as file:
        async for data in mirror.stream(f"targets/{target.file_name}", target.size, here):
            if pace is not None:
                await pace.take(len(data))
            await asyncio.to_thread(file.write, data)
        file.flush()
        await asyncio.to_thread(os.fsync, file.fileno())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
