"""The registry of adapters: immutable versions by digest with their lineage, and which of them serves.

Layout of its folder, all of it plain files that are only ever replaced whole:

    <name>/standing.json                what serves under the name, and what is tainted (`versions.Standing`)
    <name>/lives.json                   what was lived with its versions (`runtime/lives.py`)
    <name>/<sha256>/adapter.gguf        the bytes that the digest names
    <name>/<sha256>/version.json        `versions.Version`, written once
    <name>/<sha256>/notes.json          a list of `versions.Note`: what a gate found, why it was rolled back

Invariants: what a method has acknowledged survives `kill -9` and a power cut; a version is there whole or
not at all; a promotion is one rename, so every reader sees the old version or the new one. Writers of any
process exclude each other by a lock on the folder; readers need none. Nothing here imports torch.
An adapter comes in only when every tensor of it fits the model in name and shape and the recorded digest of
the model is the one that was asked for (`quant/adapter_check.py`).
Not covered: whether an adapter is any good (`gate.py`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import filelock
import msgspec

from lichen.adapters.versions import BASE, ROLLED_BACK, Difference, Lineage, Note, Standing, Version
from lichen.durable import sync_folder, sync_tree, write_file
from lichen.errors import AdapterError, DiskFull, NotFound, RegistryError, StoreError
from lichen.quant.adapter_check import check_adapter

ADAPTER, VERSION, NOTES, STANDING, LOCK = (
    "adapter.gguf",
    "version.json",
    "notes.json",
    "standing.json",
    ".lock",
)
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
DIGEST = re.compile(r"[0-9a-f]{64}")
DEFAULT_LIMIT = 2_000_000_000  # bytes of all versions together
HISTORY = 16  # promotions of a name that can be taken back
SHORTEST = 6  # digits that a person may shorten a digest to
LOCKED_S = 30.0

T = TypeVar("T")


class Registry:
    """Versions of adapters under `folder`. Every method blocks for the disk; safe from any thread.

    limit: bytes that all versions may take; past it the oldest go that are neither active nor the one before
    it, nor have just come. Raises StoreError or DiskFull for whatever the disk refuses.
    """

    def __init__(self, folder: Path, *, limit: int = DEFAULT_LIMIT) -> None:
        self.folder = folder
        self._limit = limit

    # Versions

    def add(self, name: str, file: Path, lineage: Lineage, *, model: Path) -> Version:
        """Take an adapter in; it does not serve before `promote`. The same bytes again are the same version.

        model: the GGUF that it is for, of which the header is read. Raises AdapterError for one that does not
        fit that model or says that it was trained over other bytes than lineage.base, ModelFileError for one
        that is no sound GGUF, RequestError's kin for a bad name.
        """
        checked_name(name)
        if not DIGEST.fullmatch(lineage.base):
            raise AdapterError("The lineage of an adapter must name its model by a sha256.")
        with _translated(self.folder), self._writing():
            staged = self.folder / name / f".{secrets.token_hex(8)}.partial"
            staged.mkdir(parents=True, mode=0o700)
            try:
                return self._add(name, file, staged, lineage, model)
            finally:
                shutil.rmtree(staged, ignore_errors=True)

    def _add(self, name: str, file: Path, staged: Path, lineage: Lineage, model: Path) -> Version:
        """Check the copy, not what it was copied from: that one may change meanwhile."""
        copy = staged / ADAPTER
        shutil.copyfile(file, copy)
        summary = check_adapter(copy, model)
        if summary.base and summary.base != lineage.base:
            raise AdapterError(
                f"{file.name} was trained over the model {summary.base[:12]}, not over {lineage.base[:12]}.",
                hint="Use the model that it was trained for.",
            )
        standing = self.standing(name) if self._versions(name) else Standing()
        if standing.base not in ("", lineage.base):
            raise RegistryError(
                f"The adapter {name} is for the model {standing.base[:12]}, not for {lineage.base[:12]}.",
                hint="Choose another name.",
            )
        with copy.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        place = self.folder / name / digest
        if place.exists():
            return self.version(name, digest)
        version = Version(
            name=name,
            digest=digest,
            size=copy.stat().st_size,
            created=time.time(),
            lineage=lineage,
            architecture=summary.architecture,
            alpha=summary.alpha,
            ranks=summary.ranks,
            heads=summary.heads,
        )
        write_file(staged / VERSION, _encoded(version))
        sync_tree(staged)
        if not standing.base:
            self._stand(name, msgspec.structs.replace(standing, base=lineage.base))
        staged.rename(place)
        sync_folder(place.parent)
        sync_folder(self.folder)
        self._trim(version)
        return version

    def names(self) -> list[str]:
        """Every name that has a version, sorted."""
        if not self.folder.is_dir():
            return []
        with _translated(self.folder):
            there = [path.name for path in self.folder.iterdir() if NAME.fullmatch(path.name)]
        return sorted(name for name in there if self._versions(name))

    def versions(self, name: str) -> list[Version]:
        """The versions of a name, oldest first. Raises NotFound where there is none."""
        digests = self._versions(checked_name(name))
        if not digests:
            raise NotFound(f"There is no adapter {name!r}.", hint="'lichen adapters list' shows them.")
        versions = [self._read(self.folder / name / digest / VERSION, Version) for digest in digests]
        return sorted(versions, key=lambda version: (version.created, version.digest))

    def version(self, name: str, digest: str | None = None) -> Version:
        """One version: by its digest or enough of its beginning; None for the active one. Raises NotFound."""
        return self._read(self.folder / name / self._digest(name, digest) / VERSION, Version)

    def file(self, name: str, digest: str | None = None) -> Path:
        """The GGUF of a version, as `version` finds it. Raises NotFound."""
        return self.folder / name / self._digest(name, digest) / ADAPTER

    def place(self, name: str, digest: str) -> Path:
        """Where the GGUF of a version lies, or would lie."""
        return self.folder / name / digest / ADAPTER

    # What serves

    def standing(self, name: str) -> Standing:
        """What serves under a name, and what of it is tainted."""
        path = self.folder / checked_name(name) / STANDING
        return self._read(path, Standing) if path.exists() else Standing()

    def active(self, name: str) -> Version | None:
        """The version that serves; None for none. Raises NotFound for an unknown name."""
        if not self._versions(checked_name(name)):
            raise NotFound(f"There is no adapter {name!r}.", hint="'lichen adapters list' shows them.")
        digest = self.standing(name).active
        return None if digest is None else self.version(name, digest)

    def promote(self, name: str, digest: str, *, tainted: bool = False) -> Version:
        """Let a version serve; the one before stays for `rollback`. One that serves already stays.

        tainted: even if it learned from something that was forgotten since. Raises NotFound, RegistryError.
        """
        with _translated(self.folder), self._writing():
            version = self.version(name, digest)
            standing = self.standing(name)
            if version.digest in standing.tainted and not tainted:
                raise RegistryError(
                    f"The version {version.digest[:12]} of {name} learned from what was forgotten since.",
                    hint="Train it again without that.",
                )
            if standing.active != version.digest:
                history = (*(standing.history or (BASE,)), version.digest)
                self._stand(name, msgspec.structs.replace(standing, history=history[-HISTORY:]))
            return version

    def rollback(
        self, name: str, *, reason: str = "", of: str | None = None, facts: dict[str, Any] | None = None
    ) -> Version | None:
        """Let the version before the active one serve again, or the model alone (None) where none was.

        Versions that are gone or tainted are passed over. Raises NotFound, and RegistryError where nothing
        serves, or something else than `of`. The version that goes gets a note with the reason and the facts.
        """
        with _translated(self.folder), self._writing():
            there = self._versions(checked_name(name))
            standing = self.standing(name)
            if standing.active is None:
                raise RegistryError(f"No version of {name} serves, so there is none to roll back.")
            if of not in (None, standing.active):
                raise RegistryError(f"Another version of {name} serves meanwhile.")
            self._stand(name, msgspec.structs.replace(standing, history=standing.before(there)))
            if standing.active in there:
                values = {"reason": reason, **(facts or {})}
                self._note(name, standing.active, Note(kind=ROLLED_BACK, values=values))
            return self.active(name) if there else None

    def before(self, name: str) -> str:
        """Digest of the version that a rollback would let serve, BASE for the model alone."""
        return self.standing(name).before(self._versions(checked_name(name)))[-1]

    # What is known of a version

    def note(self, name: str, digest: str, note: Note) -> None:
        """Add what was found about a version. Raises NotFound."""
        with _translated(self.folder), self._writing():
            self._note(name, self._digest(name, digest), note)

    def notes(self, name: str, digest: str) -> list[Note]:
        """What was found about a version, oldest first. Raises NotFound."""
        path = self.folder / name / self._digest(name, digest) / NOTES
        return self._read(path, list[Note]) if path.exists() else []

    def taint(self, digests: Iterable[str]) -> list[Version]:
        """Mark versions that learned from something that was to be forgotten (`Journal.forget`, `tainted`);
        those of them that are here, under any name. They go on serving until they are replaced.
        """
        wanted = frozenset(digests)
        found: list[Version] = []
        with _translated(self.folder), self._writing():
            for name in self.names():
                there = wanted.intersection(self._versions(name))
                standing = self.standing(name)
                if new := there.difference(standing.tainted):
                    marks = standing.tainted | dict.fromkeys(sorted(new), time.time())
                    self._stand(name, msgspec.structs.replace(standing, tainted=marks))
                found += [self.version(name, digest) for digest in sorted(there)]
        return found

    def diff(self, name: str, a: str, b: str) -> Difference:
        """What two versions have not in common, down to the layers. Reads both. Raises NotFound."""
        from lichen.adapters.compare import compare  # numpy, which nothing else here needs

        first, second = self.version(name, a), self.version(name, b)
        return compare(first, self.file(name, first.digest), second, self.file(name, second.digest))

    def remove(self, name: str, digest: str | None = None) -> None:
        """Delete one version, or the name with all. Raises NotFound, RegistryError for the active one."""
        with _translated(self.folder), self._writing():
            if digest is None:
                self.versions(name)
                self._delete(self.folder / name)
                return
            found = self._digest(name, digest)
            if found == self.standing(name).active:
                raise RegistryError(
                    f"The version {found[:12]} of {name} serves.", hint="Roll back or promote another first."
                )
            self._delete(self.folder / name / found)

    # Below: files

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with filelock.FileLock(self.folder / LOCK, timeout=LOCKED_S):
                yield
        except filelock.Timeout:
            raise RegistryError("Another process is changing the adapters.", hint="Try again.") from None

    def _versions(self, name: str) -> frozenset[str]:
        try:
            entries = [path.name for path in (self.folder / name).iterdir()]
            return frozenset(entry for entry in entries if DIGEST.fullmatch(entry))
        except FileNotFoundError:
            return frozenset()

    def _digest(self, name: str, digest: str | None) -> str:
        """The whole digest of a version that is here. Raises NotFound."""
        there = self._versions(checked_name(name))
        wanted = self.standing(name).active if digest is None else digest
        found = [one for one in there if wanted and one.startswith(wanted)]
        if wanted is None or len(found) != 1 or len(wanted) < SHORTEST:
            what = "active version" if digest is None else f"one version {digest!r}"
            raise NotFound(
                f"The adapter {name!r} has no {what}.", hint=f"'lichen adapters show {name}' lists them."
            )
        return found[0]

    def _read(self, path: Path, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except FileNotFoundError:
            raise NotFound("This version was removed meanwhile.") from None
        except msgspec.MsgspecError as error:
            raise RegistryError(
                f"{path} is not what lichen wrote: {error}.", hint="Remove this adapter and import it again."
            ) from None

    def _stand(self, name: str, standing: Standing) -> None:
        write_file(self.folder / name / STANDING, _encoded(standing))

    def _note(self, name: str, digest: str, note: Note) -> None:
        write_file(self.folder / name / digest / NOTES, _encoded([*self.notes(name, digest), note]))

    def _trim(self, newest: Version) -> None:
        """Drop the oldest versions until all of them fit, but none that serves, served last, or just came."""
        for left in self.folder.glob("*/.*"):  # of a process that was killed: nobody else writes now
            if left.suffix in (".partial", ".gone"):
                shutil.rmtree(left, ignore_errors=True)
        versions = [version for name in self.names() for version in self.versions(name)]
        excess = sum(version.size for version in versions) - self._limit
        kept = {name: self.standing(name).kept for name in self.names()}
        for version in sorted(versions, key=lambda version: version.created):
            if excess <= 0:
                return
            if version.digest not in kept[version.name] and version != newest:
                self._delete(self.folder / version.name / version.digest)
                excess -= version.size

    def _delete(self, path: Path) -> None:
        """First out of sight at once, then away."""
        gone = path.with_name(f".{secrets.token_hex(8)}.gone")
        path.rename(gone)
        sync_folder(gone.parent)
        shutil.rmtree(gone)


def checked_name(name: str) -> str:
    """A name that can be an adapter's. Raises NotFound: there is none of any other name."""
    if not NAME.fullmatch(name):
        raise NotFound(
            f"{name!r} cannot be the name of an adapter.",
            hint="Use lower-case letters, digits, '.', '_' and '-'.",
        )
    return name


def _encoded(content: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(content))


@contextmanager
def _translated(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = 0
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(folder).free
            raise DiskFull(str(folder), 1, free) from error
        raise StoreError(f"The adapters in {folder} cannot be used: {error.strerror}.") from error
