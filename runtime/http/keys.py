"""API keys of one home: made once, shown once, kept as hashes in `keys.json`, revoked without a restart.

The file is written by `lichen keys` and read by the daemon, which looks for a new version at most once a
second. A revoked key stays in the file: a daemon whose last key was revoked must not fall open.

Not covered: keys that expire or may only do some things.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from lichen.durable import write_file
from lichen.errors import ConfigError, NotFound

PREFIX = "lk-"
SECRET_BYTES = 32
FILE_LIMIT = 1 << 20  # bytes, some thousand keys
CHECK_EVERY = 1.0  # seconds between two looks at the file
LOCK_TIMEOUT = 10.0  # seconds
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is known of a key: never the key itself. created: UTC, ISO 8601; ending: its last 4 characters."""

    id: Annotated[str, Meta(pattern=r"\Akey_[0-9a-f]{12}\Z")]
    name: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._@-]{0,63}\Z")]
    created: Annotated[str, Meta(pattern=r"\A[0-9T:+.-]{10,40}\Z")]
    ending: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_-]{4}\Z")]
    sha256: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    revoked: bool = False
    keeps: bool = False  # answers to its requests go into the journal unless a request says otherwise


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`keys.json`."""

    version: Literal[1]
    keys: tuple[Key, ...] = ()


_Seen = tuple[int, int, int] | None  # (inode, size in bytes, mtime in ns) of the file; None: there is none


class KeyStore:
    """The keys in one file. A missing file holds no keys; one that cannot be trusted is a ConfigError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._keys: tuple[Key, ...] = ()
        self._seen: _Seen = None
        self._failure: ConfigError | None = None
        self._next_look = 0.0

    def create(self, name: str, *, keeps: bool = False) -> str:
        """Make a key and return it; it cannot be shown again. keeps: see `Key`. Raises ConfigError."""
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} cannot be a key's name.",
                hint="Use up to 64 letters, digits, dots, dashes, underscores and @.",
            )
        secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
        key = Key(
            id=f"key_{secrets.token_hex(6)}",
            name=name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            ending=secret[-4:],
            sha256=_digest(secret),
            keeps=keeps,
        )
        with self._locked():
            keys = self._read()
            if any(other.name == name and not other.revoked for other in keys):
                raise ConfigError(
                    f"There is a key named {name!r} already.", hint="Revoke it, or take another name."
                )
            self._write((*keys, key))
        return secret

    def revoke(self, name: str) -> Key:
        """Make the key with this id, or the active one with this name, worthless.

        Raises NotFound, or ConfigError for a file that cannot be used.
        """
        with self._locked():
            keys = self._read()
            found = [key for key in keys if key.id == name] or [
                key for key in keys if key.name == name and not key.revoked
            ]
            if not found:
                raise NotFound(f"There is no key {name!r}.", hint="'lichen keys list' shows them.")
            revoked = msgspec.structs.replace(found[0], revoked=True)
            self._write(tuple(revoked if key.id == revoked.id else key for key in keys))
        return revoked

    def list(self) -> tuple[Key, ...]:
        """Every key, revoked ones too, oldest first. Raises ConfigError."""
        return self._read()

    def any(self) -> bool:
        """Whether a key was ever made here, so that requests need one. Raises ConfigError."""
        return bool(self._current())

    def verify(self, presented: str) -> Key | None:
        """The active key that was presented, or None. Raises ConfigError.

        Every stored hash is compared, in constant time, so that the time tells nothing about which matched.
        """
        digest = _digest(presented)
        match: Key | None = None
        for key in self._current():
            if hmac.compare_digest(digest, key.sha256) and not key.revoked:
                match = key
        return match

    def _current(self) -> tuple[Key, ...]:
        """The keys as of at most a second ago. A bad file stays an error until it is mended."""
        now = time.monotonic()
        if now >= self._next_look:
            try:
                seen = self._look()
                if seen != self._seen or self._failure is not None:
                    self._keys, self._seen, self._failure = self._read(), seen, None
            except ConfigError as error:
                self._failure = error
            self._next_look = now + CHECK_EVERY
        if self._failure is not None:
            raise self._failure
        return self._keys

    def _look(self) -> _Seen:
        """Raises ConfigError for what is not a plain file that only its owner can change."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unreadable(error) from error
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"The key file {self.path} is not a file.")
        if os.name == "posix" and found.st_mode & 0o022:
            raise ConfigError(
                f"Other users can change the key file {self.path}.", hint=f"chmod 600 {self.path}"
            )
        return (found.st_ino, found.st_size, found.st_mtime_ns)

    def _read(self) -> tuple[Key, ...]:
        if self._look() is None:
            return ()
        try:
            with self.path.open("rb") as stream:
                content = stream.read(FILE_LIMIT + 1)
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise self._unreadable(error) from error
        if len(content) > FILE_LIMIT:
            raise ConfigError(f"The key file {self.path} is larger than {FILE_LIMIT:,} bytes.")
        try:
            keys = msgspec.json.decode(content, type=_File).keys
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(
                f"The key file {self.path} is damaged: {error}.",
                hint="Restore it, or delete it and make new keys with: lichen keys create NAME",
            ) from error
        if len({key.id for key in keys}) < len(keys):
            raise ConfigError(f"The key file {self.path} is damaged: two keys have one id.")
        return keys

    def _write(self, keys: tuple[Key, ...]) -> None:
        """Replace the file: a reader sees the old one or the new one, also after a power cut."""
        content = msgspec.json.format(msgspec.json.encode(_File(version=1, keys=keys)), indent=2)
        if len(content) > FILE_LIMIT:
            raise ConfigError(f"The key file {self.path} is full.", hint="Delete it and make new keys.")
        try:
            write_file(self.path, content, mode=0o600)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"The key file {self.path} cannot be written: {reason}.") from error
        self._next_look = 0.0

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock between processes that change the file. Raises ConfigError."""
        from filelock import FileLock, Timeout

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{self.path}.lock", timeout=LOCK_TIMEOUT, mode=0o600)
            lock.acquire()
        except Timeout as error:
            raise ConfigError(
                f"Another process holds the key file {self.path}.", hint="Try again."
            ) from error
        except OSError as error:
            raise self._unreadable(error) from error
        try:
            yield
        finally:
            lock.release()

    def _unreadable(self, error: OSError) -> ConfigError:
        return ConfigError(f"The key file {self.path} cannot be used: {error.strerror or error}.")


def _digest(secret: str) -> str:
    """A fast hash is right here: a key is 256 random bits, which nobody guesses however fast the hash is.

    Slow hashes protect passwords that people choose; here one would only make each request slow.
    """
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
