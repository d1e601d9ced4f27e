"""The device's own key: made at enrolment, never leaves the device, signs its reports.

It says nothing about what the device may install; that is for the fleet's keys (`trust/`). Losing it costs a
new name among the fleet's devices and nothing else.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from lichen.durable import write_file
from lichen.errors import FleetError
from lichen.sync.reporting.wire import Purpose, device_id, signed_bytes

SEED = 32  # bytes


class DeviceKey:
    """An Ed25519 key (RFC 8032). public: 32 raw bytes. id: their sha256 in hex."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public = private.public_key().public_bytes_raw()
        self.id = device_id(self.public)

    @classmethod
    def generate(cls) -> DeviceKey:
        """A new key that is written nowhere."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def at(cls, path: Path) -> DeviceKey:
        """The key in a file, which is made (mode 0600) if it is not there.

        Raises FleetError for a file that cannot be read, is no key, or that others may read.
        """
        try:
            if not path.exists():
                _create(path)
            status = path.stat()
            seed = path.read_bytes()
        except OSError as error:
            raise FleetError(f"The device's key {path} cannot be used: {error.strerror}.") from error
        if os.name != "nt" and status.st_mode & 0o077:
            raise FleetError(f"Others may read the device's key {path}.", hint=f"chmod 600 {path}")
        if len(seed) != SEED:
            raise FleetError(
                f"{path} is no device key: it has {len(seed)} bytes, not {SEED}.",
                hint="Delete it; the device then gets a new key and joins again.",
            )
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    def sign(self, purpose: Purpose, body: bytes) -> bytes:
        """64 bytes over a body and what it is for."""
        return self._private.sign(signed_bytes(purpose, body))


def verify(public: bytes, purpose: Purpose, body: bytes, signature: bytes) -> bool:
    """Whether the holder of this key signed this body for this purpose."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, signed_bytes(purpose, body))
    except (InvalidSignature, ValueError):
        return False
    return True


def _create(path: Path) -> None:
    """Of two processes that make it at once, both use the one that came first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    write_file(staged, Ed25519PrivateKey.generate().private_bytes_raw(), mode=0o600)
    try:
        os.link(staged, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
