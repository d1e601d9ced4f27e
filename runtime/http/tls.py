"""TLS for the daemon: a context from a certificate and its key, or one sentence about what is wrong."""

from __future__ import annotations

import ssl
from pathlib import Path

from lichen.errors import ConfigError


def server_context(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """The context to listen with; None without a certificate. TLS 1.2 or newer.

    certificate: PEM, with intermediates after it. key: PEM; where None, it is in the certificate's file.
    Raises ConfigError naming the file.
    """
    if certificate is None:
        if key is not None:
            raise ConfigError(
                "tls_key is set, but tls_cert is not.", hint="Give both with --tls-cert and --tls-key."
            )
        return None
    for setting, path in (("tls_cert", certificate), ("tls_key", key)):
        if path is not None:
            _check_readable(setting, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # OpenSSL would ask the terminal for the password of an encrypted key, and a daemon would hang there.
        context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        raise ConfigError(_explained(error, certificate, key or certificate)) from error
    return context


def _check_readable(setting: str, path: Path) -> None:
    try:
        if not path.is_file():
            reason = "is not a file" if path.exists() else "does not exist"
            raise ConfigError(f"The file {path} of the setting {setting} {reason}.")
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ConfigError(
            f"The file {path} of the setting {setting} cannot be read: {error.strerror}."
        ) from error


def _explained(error: ssl.SSLError, certificate: Path, key: Path) -> str:
    if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
        return f"The key {key} does not belong to the certificate {certificate}."
    # One wrong password in 256 decrypts to something, so the reason alone does not tell.
    if error.reason in ("BAD_DECRYPT", "BAD_PASSWORD_READ") or b"ENCRYPTED" in key.read_bytes():
        return f"The key {key} is encrypted; lichen needs one without a password."
    return f"{certificate} and {key} are not a certificate and a key in PEM form ({error.reason or error})."
