"""A TUF repository in memory that can be made to lie: the enemy of the tests of trust.

It signs whatever it is told to sign and serves it as a mirror. A test changes a role's object, releases it,
and then tampers with files, keys or versions as the attack demands.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import AsyncIterator, Callable
from typing import Any

from securesystemslib.signer import CryptoSigner
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

from lichen.errors import NotFound, SourceError
from lichen.sync.manifest import KINDS
from lichen.sync.trust.fetching import too_long

NOW = datetime.datetime(2026, 11, 24, 12, tzinfo=datetime.UTC)
YEAR = NOW + datetime.timedelta(days=365)
BASE = "b" * 64
Files = dict[str, bytes]


def manifest(path: str, length: int, **more: Any) -> dict[str, Any]:
    """Custom metadata of a sound target."""
    kind, _, name = path.partition("/")
    by_kind: dict[str, dict[str, Any]] = {
        "models": {"architecture": "llama"},
        "adapters": {"base": BASE},
        "mixtures": {"sources": 2},
        "checkpoints": {"base": BASE, "use": "draft_head"},
        "policies": {"schema": 1},
    }
    own = by_kind.get(kind, {})
    return {"kind": kind, "name": name, "size": length, "licence": "Apache-2.0", **own, **more}


class HostileRepository:
    """Roles as objects, keys by role, and `files` by the name under which a mirror serves them."""

    def __init__(self, *, root_keys: int = 3, threshold: int = 2) -> None:
        self.files: Files = {}
        self.keys: dict[str, list[CryptoSigner]] = {"root": [new_key() for _ in range(root_keys)]}
        for role in ("timestamp", "snapshot", "targets", *KINDS):
            self.keys[role] = [new_key()]
        self.root = Root(1, expires=YEAR, consistent_snapshot=True)
        for role in ("root", "timestamp", "snapshot", "targets"):
            self.root.roles[role] = Role([key.public_key.keyid for key in self.keys[role]], 1)
            for key in self.keys[role]:
                self.root.keys[key.public_key.keyid] = key.public_key
        self.root.roles["root"].threshold = threshold
        self.timestamp = Timestamp(0 + 1, expires=YEAR)
        self.snapshot = Snapshot(1, expires=YEAR, meta={})
        self.roles: dict[str, Targets] = {
            "targets": Targets(1, expires=YEAR, delegations=Delegations({}, {}))
        }
        for kind in KINDS:
            self.delegate("targets", kind, [f"{kind}/*"], self.keys[kind])
        self.sign_root()
        self.first_root = self.files["metadata/1.root.json"]
        self.release(bump=False)

    def delegate(
        self, parent: str, role: str, paths: list[str], keys: list[CryptoSigner], *, terminating: bool = True
    ) -> Targets:
        """Let `parent` delegate `paths` to `role`."""
        self.keys[role] = keys
        targets = self.roles[parent]
        if targets.delegations is None:
            targets.delegations = Delegations({}, {})
        assert targets.delegations.roles is not None
        targets.delegations.roles[role] = DelegatedRole(role, [], 1, terminating, paths)
        for key in keys:
            targets.add_key(key.public_key, role)
        return self.roles.setdefault(role, Targets(1, expires=YEAR))

    def add(self, path: str, data: bytes, *, role: str | None = None, **more: Any) -> TargetFile:
        """Put a target into a role (its kind's, unless told otherwise) and its bytes on the mirror."""
        target = TargetFile.from_data(path, data, ["sha256"])
        target.unrecognized_fields["custom"] = manifest(path, len(data), **more)
        self.roles[role or path.partition("/")[0]].targets[path] = target
        self.files[f"targets/{target.get_prefixed_paths()[0]}"] = data
        return target

    def sign_root(self, signers: list[CryptoSigner] | None = None) -> None:
        """Serve the root object as its version."""
        data = signed(self.root, self.keys["root"] if signers is None else signers)
        self.files[f"metadata/{self.root.version}.root.json"] = data

    def next_root(
        self, change: Callable[[Root], None] = lambda root: None, signers: list[CryptoSigner] | None = None
    ) -> None:
        """One rotation: change the root, count it up, sign it with its keys or with `signers`."""
        self.root.version += 1
        change(self.root)
        self.sign_root(signers)

    def replace_root_keys(self, keys: list[CryptoSigner], signers: list[CryptoSigner]) -> None:
        """A next root with other root keys."""

        def change(root: Root) -> None:
            for keyid in list(root.roles["root"].keyids):
                root.revoke_key(keyid, "root")
            for key in keys:
                root.add_key(key.public_key, "root")

        self.keys["root"] = keys
        self.next_root(change, signers)

    def replace_key(self, role: str) -> None:
        """A next root with another key for timestamp, snapshot or targets."""
        old, self.keys[role] = self.keys[role], [new_key()]

        def change(root: Root) -> None:
            for key in old:
                root.revoke_key(key.public_key.keyid, role)
            root.add_key(self.keys[role][0].public_key, role)

        self.next_root(change)

    def release(self, *, bump: bool = True) -> None:
        """Sign everything below root and serve it."""
        for name, targets in self.roles.items():
            targets.version += bump
            data = signed(targets, self.keys[name])
            self.files[f"metadata/{targets.version}.{name}.json"] = data
            self.snapshot.meta[f"{name}.json"] = MetaFile.from_data(targets.version, data, ["sha256"])
        self.sign_snapshot(bump=bump)

    def sign_snapshot(self, *, bump: bool = True) -> None:
        """Sign and serve snapshot and timestamp as they are."""
        self.snapshot.version += bump
        data = signed(self.snapshot, self.keys["snapshot"])
        self.files[f"metadata/{self.snapshot.version}.snapshot.json"] = data
        self.timestamp.snapshot_meta = MetaFile.from_data(self.snapshot.version, data, ["sha256"])
        self.sign_timestamp(bump=bump)

    def sign_timestamp(self, *, bump: bool = True) -> None:
        """Sign and serve the timestamp as it is."""
        self.timestamp.version += bump
        self.files["metadata/timestamp.json"] = signed(self.timestamp, self.keys["timestamp"])

    def mirror(self) -> MemoryMirror:
        """What this repository serves now; later changes do not reach it."""
        return MemoryMirror(dict(self.files))

    def copy(self) -> HostileRepository:
        """The same repository and keys, to go another way from here."""
        twin = copy.copy(self)
        twin.files, twin.keys = dict(self.files), dict(self.keys)
        for part in ("root", "timestamp", "snapshot", "roles"):
            setattr(twin, part, copy.deepcopy(getattr(self, part)))
        return twin


class MemoryMirror:
    """A fetcher over a dictionary. endless: names that never end."""

    def __init__(self, files: Files, address: str = "memory:") -> None:
        self.files, self._address = files, address
        self.asked: list[str] = []
        self.endless: set[str] = set()
        self.sent = 0

    @property
    def address(self) -> str:
        return self._address

    async def stream(self, name: str, limit: int, start: int = 0) -> AsyncIterator[bytes]:
        self.asked.append(name)
        sent = 0
        while name in self.endless:
            sent += 1 << 16
            self.sent += 1 << 16
            if sent > limit:
                raise too_long(self.address, name, limit)
            yield b" " * (1 << 16)
        if name not in self.files:
            raise NotFound(f"no {name}")
        if len(self.files[name]) > limit:
            raise too_long(self.address, name, limit)
        yield self.files[name][start:]


class DeadMirror(MemoryMirror):
    """A mirror that cannot be reached."""

    async def stream(self, name: str, limit: int, start: int = 0) -> AsyncIterator[bytes]:
        for part in self.files.values():
            yield part
        raise SourceError("the mirror is dead")


def new_key() -> CryptoSigner:
    """An Ed25519 key that nobody keeps."""
    return CryptoSigner.generate_ed25519()


def signed(part: Root | Timestamp | Snapshot | Targets, keys: list[CryptoSigner]) -> bytes:
    """A role's metadata as bytes, signed by `keys`."""
    metadata: Metadata[Any] = Metadata(part)
    for key in keys:
        metadata.sign(key, append=True)
    return metadata.to_bytes()
