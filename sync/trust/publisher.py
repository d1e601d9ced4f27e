"""The publisher's side of a fleet: a TUF repository of static files, and the steps that change it.

    metadata/timestamp.json, N.snapshot.json, N.targets.json, N.<kind>.json, N.root.json
    targets/            see target_store.py

Every step writes new, versioned files first and timestamp.json last, so that a reader of the static files
sees the old repository or the new one and never a mix, also when a step is killed. No file but timestamp.json
is ever written twice under one name. Keys are asked only for the roles that a step signs: root keys can stay
offline.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
from securesystemslib.signer import SSlibKey
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from lichen.errors import FleetError
from lichen.sync.download import hash_file
from lichen.sync.manifest import KINDS, AnyManifest, custom_of
from lichen.sync.trust.repository import TOP_LEVEL, Repository
from lichen.sync.trust.signers import Signers
from lichen.sync.trust.target_store import ChunkedTargets, TargetStore

LIFETIMES = {"root": 365, "targets": 180, "snapshot": 30, "timestamp": 7}  # days
KIND_LIFETIME = 180
Clock = Callable[[], datetime.datetime]


class RoleRow(NamedTuple):
    """One role: when it expires (ISO 8601, UTC), how many keys must sign, and each key's id, name and URI."""

    role: str
    version: int
    expires: str
    threshold: int
    keys: list[dict[str, str]]


class Publisher:
    """Changes the repository under `folder` with the keys of `signers`. clock: aware UTC times."""

    def __init__(
        self, folder: Path, signers: Signers, *, clock: Clock, targets: TargetStore | None = None
    ) -> None:
        self._repository = Repository(folder)
        self._signers = signers
        self._clock = clock
        self._targets = ChunkedTargets(folder) if targets is None else targets

    def init(self, *, root_keys: int = 3, threshold: int = 2) -> bytes:
        """Make keys and a repository with one delegated role a kind; returns the bytes of root version 1.

        Raises FleetError for a repository that is there already or a threshold that cannot be reached.
        """
        if not 1 <= threshold <= root_keys <= 16:
            raise FleetError(f"A threshold of {threshold} of {root_keys} root keys cannot be.")
        with self._changing(new=True):
            roots = [self._signers.create(f"root-{number}") for number in range(1, root_keys + 1)]
            keys = {role: [self._signers.create(role)] for role in (*TOP_LEVEL[1:], *KINDS)}
            root = Root(
                version=1,
                expires=self._expiry("root"),
                roles={role: Role([], 1) for role in TOP_LEVEL},
                consistent_snapshot=True,
            )
            root.roles["root"].threshold = threshold
            for role, members in {"root": roots, **{r: keys[r] for r in TOP_LEVEL[1:]}}.items():
                for key in members:
                    root.add_key(key, role)
            self._write_root(root, [])
            delegations = Delegations({}, {kind: _delegation(kind) for kind in KINDS})
            targets = Targets(version=1, delegations=delegations)
            for kind in KINDS:
                targets.add_key(keys[kind][0], kind)
            self._release({"targets": targets, **{kind: Targets(version=1) for kind in KINDS}})
            return self._repository.read("1.root.json")

    def roles(self) -> list[RoleRow]:
        """Every role that counts now, and its keys. Raises FleetError."""
        names, uris = self._signers.names(), self._signers.uris()
        root, top = self._repository.root(), self._repository.targets("targets")
        rows = []
        for role, (version, expires) in self._repository.expiries().items():
            judge = root.roles[role] if role in TOP_LEVEL else top.get_delegated_role(role)
            known = [names.get(keyid, "") for keyid in judge.keyids]
            keys = [
                {"id": keyid, "name": name or keyid[:12], "uri": uris.get(name, "")}
                for keyid, name in zip(judge.keyids, known, strict=True)
            ]
            rows.append(RoleRow(role, version, expires.isoformat(), judge.threshold, keys))
        return rows

    def publish(self, source: Path, manifest: AnyManifest) -> TargetFile:
        """Add or replace a target under its kind's role. Raises FleetError.

        Differences are made to the version that it replaces, or else to its nearest ancestor that is here.
        """
        try:
            size, digest = source.stat().st_size, hash_file(source)
        except OSError as error:
            raise FleetError(f"{source} cannot be read: {error.strerror}.") from error
        if size != manifest.size:
            raise FleetError(f"{source} has {size} bytes, but its manifest says {manifest.size}.")
        with self._changing():
            role = self._repository.targets(manifest.kind)
            replaced = role.targets.get(manifest.path)
            older = [replaced.hashes["sha256"]] if replaced is not None else []
            older += [each.sha256 for each in manifest.lineage if each.sha256 is not None]
            recipe = self._targets.put(manifest.path, source, digest, older=older)
            manifest = msgspec.structs.replace(manifest, recipe=recipe)
            target = TargetFile(size, {"sha256": digest}, manifest.path, {"custom": custom_of(manifest)})
            role.targets[manifest.path] = target
            self._release({manifest.kind: role})
            return target

    def listed(self, kind: str) -> dict[str, TargetFile]:
        """The targets that a kind's role lists now, by path. Raises FleetError."""
        return dict(self._repository.targets(kind).targets)

    def withdraw(self, path: str) -> None:
        """Take a target out of the metadata; its bytes stay for devices that are under way."""
        with self._changing():
            kind = path.partition("/")[0]
            role = self._repository.targets(kind) if kind in KINDS else None
            if role is None or role.targets.pop(path, None) is None:
                raise FleetError(f"The repository has no target {path!r}.")
            self._release({kind: role})

    def renew(self, roles: Sequence[str] = ("timestamp",)) -> None:
        """Sign roles again with a new expiry; timestamp is always among them. Raises FleetError."""
        with self._changing():
            for role in roles:
                if role not in (*TOP_LEVEL, *KINDS):
                    raise FleetError(f"There is no role {role!r}.")
            if "root" in roles:
                self._next_root(lambda root: None)
            self._release(
                {role: self._repository.targets(role) for role in roles if role in ("targets", *KINDS)},
                snapshot="snapshot" in roles,
            )

    def rotate(self, role: str, lost: Sequence[str] = ()) -> list[str]:
        """Give a role new keys; returns their names. Raises FleetError.

        lost: names of root keys to replace; all of them if none is named. The old root keys that are at hand
        sign too, and must reach the old threshold. For timestamp, snapshot and targets a root version
        in between knows both keys: devices never meet metadata that their root refuses.
        """
        with self._changing():
            if role == "root":
                return self._rotate_root(lost)
            if role not in (*TOP_LEVEL, *KINDS):
                raise FleetError(f"There is no role {role!r}.")
            key, name = self._new_key(role)
            if role in KINDS:
                targets = self._repository.targets("targets")
                for keyid in list(targets.get_delegated_role(role).keyids):
                    targets.revoke_key(keyid, role)
                targets.add_key(key, role)
                self._release({"targets": targets, role: self._repository.targets(role)})
                return [name]
            old = list(self._repository.root().roles[role].keyids)
            self._next_root(lambda root: root.add_key(key, role))
            signed = {"targets": self._repository.targets("targets")} if role == "targets" else {}
            self._release(signed, snapshot=role == "snapshot", only={key.keyid})

            def retire(root: Root) -> None:
                for keyid in old:
                    root.revoke_key(keyid, role)

            self._next_root(retire)
            return [name]

    def _rotate_root(self, lost: Sequence[str]) -> list[str]:
        names = self._signers.names()
        keyids = self._repository.root().roles["root"].keyids
        by_name = {names.get(keyid, keyid): keyid for keyid in keyids}
        for name in lost:
            if name not in by_name:
                raise FleetError(
                    f"{name!r} is no root key.", hint=f"There are: {', '.join(sorted(by_name))}."
                )
        gone = [by_name[name] for name in lost] or list(keyids)
        fresh = [self._new_key("root") for _ in gone]

        def change(root: Root) -> None:
            for keyid in gone:
                root.revoke_key(keyid, "root")
            for key, _ in fresh:
                root.add_key(key, "root")

        self._next_root(change)
        return [name for _, name in fresh]

    def _new_key(self, role: str) -> tuple[SSlibKey, str]:
        taken = self._signers.uris()
        name = next(f"{role}-{number}" for number in range(2, 1 << 20) if f"{role}-{number}" not in taken)
        return self._signers.create(name), name

    def _next_root(self, change: Callable[[Root], object]) -> None:
        """The next version of root, signed by the old keys at hand and by the new ones."""
        root = self._repository.root()
        before = list(root.roles["root"].keyids)
        threshold = root.roles["root"].threshold
        at_hand = set(self._signers.names())
        if len(at_hand & set(before)) < threshold:
            raise FleetError(
                f"Only {len(at_hand & set(before))} of the root keys are here, but {threshold} have to sign.",
                hint="Bring the keys of the others into the folder of keys.",
            )
        change(root)
        root.version += 1
        root.expires = self._expiry("root")
        self._write_root(root, before)

    def _write_root(self, root: Root, before: Sequence[str]) -> None:
        """Sign with every root key, old and new, that can; the others are lost, within the threshold."""
        metadata, names, failure = Metadata(root), self._signers.names(), None
        for keyid in dict.fromkeys((*before, *root.roles["root"].keyids)):
            if keyid in names:
                try:
                    metadata.sign(self._signers.signer(names[keyid]), append=True)
                except FleetError as error:
                    failure = error
        previous = self._repository.root() if before else root
        for judge in (previous, root):
            if not judge.get_verification_result("root", metadata.signed_bytes, metadata.signatures):
                raise failure or FleetError("Too few root keys are here to sign the next root.")
        self._repository.write(f"{root.version}.root.json", metadata.to_bytes())

    def _release(
        self, changed: dict[str, Targets], *, snapshot: bool = False, only: set[str] | None = None
    ) -> None:
        """Sign and write changed roles, a snapshot that lists them, and last of all the timestamp.

        only: key ids to prefer where a role has several, while one of them is on its way out.
        """
        repository, files = self._repository, {}
        root = repository.root()
        listed = repository.snapshot()
        top = changed.get("targets") or repository.targets("targets")
        for role, targets in changed.items():
            targets.version = repository.next_version(role)
            targets.expires = self._expiry(role)
            keyids = (
                root.roles["targets"].keyids if role == "targets" else top.get_delegated_role(role).keyids
            )
            data = self._signed(Metadata(targets), keyids, only)
            files[f"{targets.version}.{role}.json"] = data
            listed.meta[f"{role}.json"] = MetaFile.from_data(targets.version, data, ["sha256"])
        timestamp = repository.timestamp() if repository.exists() else Timestamp(version=1)
        if changed or snapshot:
            listed.version = repository.next_version("snapshot")
            listed.expires = self._expiry("snapshot")
            data = self._signed(Metadata(listed), root.roles["snapshot"].keyids, only)
            files[f"{listed.version}.snapshot.json"] = data
            timestamp.snapshot_meta = MetaFile.from_data(listed.version, data, ["sha256"])
        timestamp.version += 1 if repository.exists() else 0
        timestamp.expires = self._expiry("timestamp")
        last = self._signed(Metadata(timestamp), root.roles["timestamp"].keyids, only)
        for name, data in files.items():
            repository.write(name, data)
        repository.write("timestamp.json", last)

    def _signed(
        self,
        metadata: Metadata[Targets] | Metadata[Snapshot] | Metadata[Timestamp],
        keyids: Sequence[str],
        only: set[str] | None,
    ) -> bytes:
        names = self._signers.names()
        chosen = [keyid for keyid in keyids if only is not None and keyid in only] or list(keyids)
        usable = [names[keyid] for keyid in chosen if keyid in names]
        if not usable:
            raise FleetError(
                f"No key that may sign {metadata.signed.type} is in {self._signers.folder}.",
                hint="Bring it there, or rotate the role's keys.",
            )
        metadata.signatures.clear()
        for name in usable:
            metadata.sign(self._signers.signer(name), append=True)
        return metadata.to_bytes()

    def _expiry(self, role: str) -> datetime.datetime:
        return self._clock().replace(microsecond=0) + datetime.timedelta(
            days=LIFETIMES.get(role, KIND_LIFETIME)
        )

    @contextmanager
    def _changing(self, *, new: bool = False) -> Iterator[None]:
        """One process at a time; and the repository is there, or with `new` is not yet."""
        from filelock import FileLock, Timeout

        if self._repository.exists() == new:
            raise FleetError(
                f"There is {'already a' if new else 'no'} repository at {self._repository.folder}.",
                hint="Take another folder." if new else "Make one: lichen fleet init FOLDER",
            )
        try:
            self._signers.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with FileLock(self._signers.folder / "lock", timeout=10, mode=0o600):
                yield
        except Timeout as error:
            raise FleetError("Another process changes the repository.", hint="Try again.") from error
        except OSError as error:
            raise FleetError(
                f"{error.filename or self._repository.folder} cannot be written: {error.strerror}."
            ) from error


def _delegation(kind: str) -> DelegatedRole:
    """Terminating: nobody but this role is asked for targets of the kind."""
    return DelegatedRole(kind, [], 1, terminating=True, paths=[f"{kind}/*"])
