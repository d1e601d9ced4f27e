"""The publisher's rollouts: policies as targets of the role `policies`, read, changed and signed.

A change is one read, one pure step and one small signed release; two processes that change the same
repository wait for each other, so that an automatic step never undoes what a person just did.
"""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from lichen.errors import FleetError
from lichen.sync.manifest import PolicyManifest
from lichen.sync.rollout import (
    SCHEMA,
    Kind,
    Policy,
    Release,
    Wave,
    open_next,
    read_policy,
    release_path,
    write_policy,
)
from lichen.sync.trust.publisher import Publisher

Clock = Callable[[], datetime.datetime]


class Rollouts:
    """The rollouts of the repository at `folder`. lock: a file beside the keys. clock: aware UTC times."""

    def __init__(self, publisher: Publisher, folder: Path, lock: Path, *, clock: Clock) -> None:
        self._publisher, self._folder, self._lock, self._clock = publisher, folder, lock, clock

    def all(self) -> list[Policy]:
        """Every rollout, by name. Policies of another schema are left out. Raises FleetError."""
        found = []
        for path, target in sorted(self._publisher.listed("policies").items()):
            custom = target.unrecognized_fields.get("custom") or {}
            if custom.get("schema") == SCHEMA:
                name = path.removeprefix("policies/")
                found.append(self._read(f"targets/policies/{target.hashes['sha256']}.{name}"))
        return found

    def get(self, name: str) -> Policy:
        """One rollout. Raises FleetError if there is none of this name."""
        for each in self.all():
            if each.name == name:
                return each
        raise FleetError(f"There is no rollout of {name!r}.", hint="Begin one: lichen fleet rollout")

    def start(
        self,
        kind: Kind,
        name: str,
        version: str,
        waves: tuple[Wave, ...],
        *,
        previous: str | None = None,
        stop_only: bool = False,
    ) -> Policy:
        """Begin to roll out a published version, with its first wave open.

        previous: the version to go back to; where it is None, the one that the last rollout of this name
        ended with. stop_only: a missed gate stops the rollout and leaves devices as they are.
        Raises FleetError.
        """
        with self._alone():
            before = next((each for each in self.all() if each.name == name), None)
            if before is not None and before.kind != kind:
                raise FleetError(
                    f"{name!r} is a rollout of {before.kind} already.", hint="Take another name."
                )
            if before is not None and before.state in ("running", "paused") and not before.complete:
                raise FleetError(
                    f"The rollout of {before.version.path} is under way.",
                    hint="Let it end, or end it with: lichen fleet rollback",
                )
            old = _standing(before) if previous is None else self._release(kind, name, previous)
            new = self._release(kind, name, version)
            if old is not None and old.sha256 == new.sha256:
                raise FleetError(f"{new.path} is what the fleet has already.", hint="Publish a new version.")
            policy = Policy(
                kind=kind,
                name=name,
                version=new,
                previous=old,
                waves=waves,
                opened=0,
                opened_at=self._now(),
                on_failure="stopped" if stop_only else "rolled_back",
            )
            return self._sign(open_next(policy, self._now()))

    def change(self, name: str, step: Callable[[Policy], Policy]) -> Policy:
        """Take one step with a rollout and sign it, if it changes anything. Raises what the step raises."""
        with self._alone():
            before = self.get(name)
            after = step(before)
            return before if after == before else self._sign(after)

    def _sign(self, policy: Policy) -> Policy:
        data = write_policy(policy)
        manifest = PolicyManifest(name=policy.name, size=len(data), licence="CC0-1.0", schema=SCHEMA)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / policy.name
            file.write_bytes(data)
            self._publisher.publish(file, manifest)
        return policy

    def _release(self, kind: str, name: str, version: str) -> Release:
        path = release_path(kind, name, version)
        target = self._publisher.listed(kind).get(path)
        if target is None:
            raise FleetError(
                f"The repository has no target {path!r}.",
                hint=f"Publish it: lichen fleet publish --kind {kind} --name {name}-{version}",
            )
        try:
            return msgspec.convert(
                {"version": version, "path": path, "sha256": target.hashes["sha256"]}, Release
            )
        except msgspec.ValidationError as error:
            raise FleetError(f"{version!r} cannot be a version: {error}.") from error

    def _read(self, name: str) -> Policy:
        try:
            return read_policy((self._folder / name).read_bytes())
        except OSError as error:
            raise FleetError(f"{self._folder / name} cannot be read: {error.strerror}.") from error

    def _now(self) -> datetime.datetime:
        return self._clock().replace(microsecond=0)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        try:
            with FileLock(self._lock, timeout=30, mode=0o600):
                yield
        except Timeout as error:
            raise FleetError("Another process changes a rollout.", hint="Try again.") from error


def _standing(before: Policy | None) -> Release | None:
    """What the fleet has after the last rollout: its version if that went through, or what was before it."""
    if before is None:
        return None
    return before.version if before.complete and before.state == "running" else before.previous
