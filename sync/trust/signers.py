"""The publisher's keys: where each one is, and how it is asked to sign.

    signers.toml        name = "URI", one line a key
    <name>.pub          the public key, PEM
    <name>.pem          the private key, PKCS8 encrypted with the passphrase (URI `lichen-file:<name>.pem`)

A URI is whatever securesystemslib has a signer for: `hsm:`, `awskms:`, `gcpkms:`, `azurekms:`, `hv:` and
others (SIGNER_FOR_URI_SCHEME). To move a key into hardware, change its line; `<name>.pub` stays.
Which key may sign for which role stands in the signed metadata, not here.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.signer import (
    SIGNER_FOR_URI_SCHEME,
    CryptoSigner,
    Key,
    SecretsHandler,
    Signer,
    SSlibKey,
)

from lichen.durable import write_file
from lichen.errors import FleetError

SCHEME = "lichen-file"
SHORTEST = 8  # characters of a passphrase
Passphrase = Callable[[], str]


class EncryptedFileSigner(CryptoSigner):
    """A private key in an encrypted PKCS8 file: `lichen-file:/absolute/path.pem`."""

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> EncryptedFileSigner:
        """Raises FleetError for a missing file or a wrong passphrase."""
        path = Path(priv_key_uri.partition(":")[2])
        if not isinstance(public_key, SSlibKey) or secrets_handler is None:
            raise FleetError(f"The key {path.name} needs a public key and a passphrase.")
        try:
            private = load_pem_private_key(path.read_bytes(), secrets_handler("passphrase").encode())
            return cls(private, public_key)
        except OSError as error:
            raise FleetError(f"The key file {path} cannot be read: {error.strerror}.") from error
        except (ValueError, TypeError) as error:
            raise FleetError(
                f"The key file {path} does not open with this passphrase.",
                hint="Set LICHEN_FLEET_PASSPHRASE, or type the passphrase that the key was made with.",
            ) from error


SIGNER_FOR_URI_SCHEME.setdefault(SCHEME, EncryptedFileSigner)


class Signers:
    """The keys under `folder`. passphrase: asked for once, and only when a key file has to be opened."""

    def __init__(self, folder: Path, passphrase: Passphrase) -> None:
        self.folder = folder
        self._ask = passphrase
        self._answer: str | None = None

    def create(self, name: str) -> SSlibKey:
        """Make an Ed25519 key and its line; the private half is written encrypted. Raises FleetError."""
        uris = self.uris()
        if name in uris:
            raise FleetError(f"There is a key {name} already.")
        private = Ed25519PrivateKey.generate()
        secret = self._passphrase("passphrase")
        if len(secret) < SHORTEST:
            raise FleetError(f"The passphrase is too short: take at least {SHORTEST} characters.")
        pem = private.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(secret.encode())
        )
        public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_file(self.folder / f"{name}.pem", pem, mode=0o600)
            write_file(self.folder / f"{name}.pub", public)
            self._write({**uris, name: f"{SCHEME}:{name}.pem"})
        except OSError as error:
            raise FleetError(
                f"The folder of keys {self.folder} cannot be written: {error.strerror}."
            ) from error
        return self.public(name)

    def uris(self) -> dict[str, str]:
        """The lines of signers.toml, by name. Raises FleetError for a malformed file."""
        path = self.folder / "signers.toml"
        try:
            lines = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise FleetError(f"{path} cannot be read: {error}.") from error
        for name, uri in lines.items():
            if not isinstance(uri, str) or ":" not in uri or not _plain(name):
                raise FleetError(f"The line of {name!r} in {path} is not a URI.")
        return {name: str(uri) for name, uri in lines.items()}

    def public(self, name: str) -> SSlibKey:
        """A public key by name. Raises FleetError."""
        path = self.folder / f"{name}.pub"
        try:
            return SSlibKey.from_crypto(load_pem_public_key(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise FleetError(f"The public key {path} cannot be read: {error}.") from error

    def names(self) -> dict[str, str]:
        """Names by key id, of the keys whose public half is here."""
        return {
            self.public(name).keyid: name for name in self.uris() if (self.folder / f"{name}.pub").is_file()
        }

    def signer(self, name: str) -> Signer:
        """A key as something that signs. Raises FleetError when it cannot be reached."""
        uri = self.uris()[name]
        scheme, _, rest = uri.partition(":")
        if scheme not in SIGNER_FOR_URI_SCHEME:
            raise FleetError(
                f"No signer is known for {scheme}:, which the key {name} asks for.",
                hint=f"There are: {', '.join(sorted(SIGNER_FOR_URI_SCHEME))}.",
            )
        if scheme == SCHEME:
            uri = f"{SCHEME}:{self.folder / rest}"
        try:
            return Signer.from_priv_key_uri(uri, self.public(name), self._passphrase)
        except FleetError:
            raise
        except Exception as error:  # what a foreign signer raises is not known
            raise FleetError(f"The key {name} ({scheme}:) cannot be used: {error}.") from error

    def _write(self, uris: dict[str, str]) -> None:
        lines = ["# One line a key: its name and where its private half is; see the guide on fleets."]
        lines += [f'{name} = "{uri}"' for name, uri in sorted(uris.items())]
        write_file(self.folder / "signers.toml", ("\n".join(lines) + "\n").encode(), mode=0o600)

    def _passphrase(self, _name: str) -> str:
        if self._answer is None:
            self._answer = self._ask()
        return self._answer


def _plain(name: str) -> bool:
    return name.replace("-", "").replace("_", "").isalnum() and name.isascii()
