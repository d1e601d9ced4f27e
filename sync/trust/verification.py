"""TUF's client workflow as decisions on bytes and a clock: this module opens no file and no socket.

A walk is a generator: it yields the file that it wants (`Wanted`), is sent that file's bytes, or None if the
repository has no such file, and returns when it has decided or raises what is wrong. Who fetches, and from
where, is not known here. Numbers in docstrings are chapters of
https://theupdateframework.github.io/specification/latest/#detailed-client-workflow.

The rules of each step (signatures, thresholds, versions, expiry, hashes) are python-tuf's TrustedMetadataSet.
Its clock is an attribute, `reference_time`, which is set here; `tests/sync/test_device.py` fails if a new
release stops heeding it.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar
from urllib.parse import quote

from tuf.api.exceptions import EqualVersionNumberError, ExpiredMetadataError, RepositoryError
from tuf.api.metadata import Root, TargetFile, Targets
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from lichen.errors import MetadataExpired, TrustError

ROOT_LIMIT = 512_000  # bytes; where no signed length says less
TIMESTAMP_LIMIT = 16_384
SNAPSHOT_LIMIT = 2_000_000
TARGETS_LIMIT = 5_000_000
MAX_ROOTS = 10_000  # rotations in one walk; each of them is signed by the last one's threshold
MAX_DELEGATIONS = 32  # roles that are asked for one target

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file of the repository: its name below `metadata/`, and the most bytes that it may have."""

    name: str
    limit: int


Walk = Generator[Wanted, bytes | None, Result]


@dataclass(frozen=True, slots=True)
class Found:
    """A target, and who vouches for it: the roles from `targets` down to the one that lists it."""

    file: TargetFile
    chain: tuple[str, ...]
    consistent: bool

    @property
    def role(self) -> str:
        """The role that lists the target."""
        return self.chain[-1]

    @property
    def names(self) -> dict[str, str]:
        """Names of the file below `targets/`, by the digest in them; empty without consistent snapshots."""
        if not self.consistent:
            return {}
        folder, slash, name = self.file.path.rpartition("/")
        return {kind: f"{folder}{slash}{digest}.{name}" for kind, digest in self.file.hashes.items()}


@dataclass(frozen=True, slots=True)
class Standing:
    """What is trusted: versions by role, and when the first of the top-level roles expires."""

    versions: Mapping[str, int]
    expires: datetime.datetime
    expires_first: str
    complete: bool  # there is a chain from root to targets


class Verification:
    """One look at a repository, from what was trusted before.

    remembered: bytes of each role that was verified earlier; it must hold "root". now: aware, UTC.
    `remembered` (the attribute) is what is trusted after each step, also when a walk ends with an error.
    Raises TrustError when the remembered root does not verify by itself.
    """

    def __init__(self, remembered: Mapping[str, bytes], now: datetime.datetime) -> None:
        self.remembered = dict(remembered)
        with _explained("root"):
            self._set = TrustedMetadataSet(self.remembered["root"], EnvelopeType.METADATA)
        self._set.reference_time = now
        self._chains: dict[str, tuple[str, ...]] = {"targets": ("targets",)}

    def refresh(self) -> Walk[None]:
        """Bring the top-level roles up to date. Raises TrustError or MetadataExpired."""
        yield from self._roots()
        yield from self._timestamp()
        yield from self._snapshot()
        yield from self._targets("targets", Root.type)

    def find(self, path: str) -> Walk[Found | None]:
        """The most trusted target of this path, after `refresh`; None if no role lists it (5.6.7)."""
        visits, visited = [("targets", Root.type)], set[str]()
        while visits and len(visited) <= MAX_DELEGATIONS:
            role, delegator = visits.pop()
            if role in visited:
                continue
            targets = yield from self._targets(role, delegator)
            if delegator != Root.type:
                self._chains[role] = (*self._chains[delegator], role)
            if path in targets.targets:
                return Found(targets.targets[path], self._chains[role], self._consistent)
            visited.add(role)
            children = []
            if targets.delegations is not None:
                for child, terminating in targets.delegations.get_roles_for_target(path):
                    children.append((child, role))
                    if terminating:
                        visits = []
                        break
            visits.extend(reversed(children))
        return None

    def listed(self, kind: str) -> Walk[list[Found]]:
        """Every target that the role of a kind lists itself, by path, after `refresh`."""
        yield from self._targets("targets", Root.type)
        targets = yield from self._targets(kind, "targets")
        chain = ("targets", kind)
        return [Found(targets.targets[path], chain, self._consistent) for path in sorted(targets.targets)]

    def _roots(self) -> Walk[None]:
        """5.3: every version of root since ours, each signed by the thresholds of the last and of itself."""
        before = self._set.root
        for _ in range(MAX_ROOTS):
            version = self._set.root.version + 1
            data = yield Wanted(f"{version}.root.json", ROOT_LIMIT)
            if data is None:
                break
            with _explained("root"):
                self._set.update_root(data)
            self.remembered["root"] = data
        if self._lost_keys(before):
            # 5.3.11: whoever held those keys may have counted the versions far up
            self.remembered.pop("timestamp", None)
            self.remembered.pop("snapshot", None)

    def _lost_keys(self, before: Root) -> bool:
        """Whether a key for timestamp or snapshot was taken back since the root `before`."""
        return any(
            set(before.roles[role].keyids) - set(self._set.root.roles[role].keyids)
            for role in ("timestamp", "snapshot")
        )

    def _timestamp(self) -> Walk[None]:
        """5.4. The remembered one, even if it has expired, guards against an older one."""
        self._reuse("timestamp")
        data = yield Wanted("timestamp.json", TIMESTAMP_LIMIT)
        with _explained("timestamp"):
            try:
                self._set.update_timestamp(_present(data, "timestamp"))
            except EqualVersionNumberError:
                return
        self.remembered["timestamp"] = _present(data, "timestamp")

    def _snapshot(self) -> Walk[None]:
        """5.5. Also guards against roles that vanish from the snapshot or whose version falls."""
        if self._reuse("snapshot"):
            return
        meta = self._set.timestamp.snapshot_meta
        prefix = f"{meta.version}." if self._consistent else ""
        data = _present((yield Wanted(f"{prefix}snapshot.json", meta.length or SNAPSHOT_LIMIT)), "snapshot")
        with _explained("snapshot"):
            self._set.update_snapshot(data)
        self.remembered["snapshot"] = data

    def _targets(self, role: str, delegator: str) -> Walk[Targets]:
        """5.6, for top-level targets and for delegated roles: the remembered one if it is still current."""
        if self._set.contains(role, delegator):
            return self._as_targets(role)
        if role in self.remembered:
            try:
                return self._set.update_delegated_targets(self.remembered[role], role, delegator)
            except (RepositoryError, ValueError):
                pass  # a newer version is wanted, or what was remembered no longer counts
        meta = self._set.snapshot.meta.get(f"{role}.json")
        if meta is None:
            raise TrustError(f"The fleet's snapshot does not list the role {role!r}.")
        prefix = f"{meta.version}." if self._consistent else ""
        data = _present((yield Wanted(f"{prefix}{quote(role, '')}.json", meta.length or TARGETS_LIMIT)), role)
        with _explained(role):
            self._set.update_delegated_targets(data, role, delegator)
        self.remembered[role] = data
        return self._as_targets(role)

    def _as_targets(self, role: str) -> Targets:
        found = self._set[role]
        assert isinstance(found, Targets)
        return found

    def _reuse(self, role: str) -> bool:
        """Load what was remembered of timestamp or snapshot; whether it needs no newer one."""
        data = self.remembered.get(role)
        if data is None:
            return False
        try:
            if role == "timestamp":
                self._set.update_timestamp(data)
            else:
                self._set.update_snapshot(data, trusted=True)
        except (RepositoryError, ValueError):
            return False
        return True

    @property
    def _consistent(self) -> bool:
        return bool(self._set.root.consistent_snapshot)


def standing(remembered: Mapping[str, bytes]) -> Standing:
    """What is trusted without looking anywhere, expired or not. Raises TrustError for a bad root."""
    verification = Verification(remembered, datetime.datetime.min.replace(tzinfo=datetime.UTC))
    trusted = verification._set
    steps: tuple[tuple[str, Callable[[bytes], object]], ...] = (
        ("timestamp", trusted.update_timestamp),
        ("snapshot", partial(trusted.update_snapshot, trusted=True)),
        ("targets", trusted.update_targets),
    )
    roles = ["root"]
    for role, load in steps:
        try:
            load(remembered[role])
        except (KeyError, RepositoryError, ValueError, RuntimeError):
            break
        roles.append(role)
    first = min(roles, key=lambda role: trusted[role].expires)
    versions = {role: trusted[role].version for role in roles}
    return Standing(versions, trusted[first].expires, first, complete=len(roles) == 4)


def check_bytes(found: Found, data: bytes) -> None:
    """Raise TrustError unless `data` has the length and every hash of the target."""
    with _explained(found.file.path):
        found.file.verify_length_and_hashes(data)


def _present(data: bytes | None, role: str) -> bytes:
    if data is None:
        raise TrustError(f"The mirror has no {role} metadata of the version that the fleet is at.")
    return data


@contextmanager
def _explained(role: str) -> Iterator[None]:
    """python-tuf's errors as lichen's; a role that nobody delegates to is a ValueError there."""
    try:
        yield
    except ExpiredMetadataError as error:
        raise MetadataExpired(
            f"The fleet's {role} metadata has expired ({error}).",
            hint="The publisher has to renew it; what is here keeps serving.",
        ) from error
    except (RepositoryError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrustError(f"The fleet's {role} does not verify: {reason.rstrip('.')}.") from error
