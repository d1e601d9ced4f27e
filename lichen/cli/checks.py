"""What `lichen doctor` looks at besides the hardware: Python, compilers, llama.cpp, the store, the daemon."""

from __future__ import annotations

import asyncio
import os
import platform
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from lichen.cli.inspect import daemon_status
from lichen.cli.settings import megabytes
from lichen.errors import LichenError, Unauthorized

if TYPE_CHECKING:
    from lichen.config import Config
    from lichen.devices.hardware import Hardware

_BINDINGS = "llama-cpp-python"

Verdict = Literal["fine", "warning", "problem"]


class Finding(NamedTuple):
    """One line of the doctor: its group, what was looked at, the verdict, and what to do about it.

    A problem keeps lichen from running; a warning does not.
    """

    group: str
    what: str
    verdict: Verdict
    detail: str


def python() -> Finding:
    """Which Python runs."""
    return Finding("software", "Python", "fine", platform.python_version())


def toolchain() -> Finding:
    """Whether llama.cpp could be built here."""
    from lichen.devices.probe import compilers

    missing = [name for name, path in compilers().items() if path is None]
    if not missing:
        return Finding("software", "compiler", "fine", "C and C++ found")
    words = f"no {' and no '.join(missing)} compiler; needed to build llama.cpp (apt install build-essential)"
    return Finding("software", "compiler", "warning", words)


def bindings(hardware: Hardware) -> Iterator[Finding]:
    """Whether llama.cpp loads, and whether it was compiled for what this machine offers."""
    from lichen.runtime import native

    try:
        version, info, offload = native.version(), native.system_info(), native.gpu_offload()
    except (LichenError, ImportError) as error:
        yield Finding("software", "llama.cpp", "problem", f"{error} Run: pip install llama-cpp-python")
        return
    yield Finding("software", "llama.cpp", "fine", f"bindings {version}, {info}")
    yield from unused(hardware, info, offload)


def unused(hardware: Hardware, info: str, offload: bool) -> Iterator[Finding]:
    """What the native library leaves unused of this machine. info: its own words. Pure."""
    from lichen.devices.build import unused_features

    again = f"build it here: pip install --force-reinstall --no-deps --no-binary {_BINDINGS} {_BINDINGS}"
    if missing := unused_features(info, hardware.machine.features):
        detail = f"llama.cpp was compiled without {', '.join(missing)}, which this processor has; {again}"
        yield Finding("software", "speed", "warning", detail)
    if hardware.gpus and not offload:
        detail = f"llama.cpp was compiled without support for the GPU; {again}, with CMAKE_ARGS for it"
        yield Finding("software", "GPU support", "warning", detail)


def store(config: Config) -> Iterator[Finding]:
    """Whether models can be kept, and what is kept."""
    from lichen.sync.store import Store

    root = config.home / "store"
    if not writable(root):
        detail = f"{root} cannot be written to: mend its rights or set LICHEN_HOME"
        yield Finding("software", "store", "problem", detail)
        return
    try:
        manifests = Store(root, offline=config.offline).manifests()
    except LichenError as error:
        yield Finding("software", "store", "problem", str(error))
        return
    begun = sum(path.stat().st_size for path in (root / "partial").glob("*.part"))
    detail = f"{len(manifests)} models, {megabytes(sum(one.size for one in manifests))}, writable"
    if begun:
        detail += f"; unfinished pulls hold {megabytes(begun)}: pull again to resume"
    yield Finding("software", "store", "fine", detail)


def writable(path: Path) -> bool:
    """Whether files can be made in `path`, or where it would be made."""
    nearest = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def daemon(config: Config) -> Finding:
    """Whether a daemon runs, or could."""
    where = config.uds or f"{config.host}:{config.port}"
    try:
        state = asyncio.run(daemon_status(config))["state"]
        return Finding("software", "daemon", "fine", f"runs at {where}, {state}")
    except Unauthorized as error:
        return Finding("software", "daemon", "warning", f"runs at {where}: {error}")
    except LichenError:
        pass  # none of ours; the port may still be taken
    try:
        taken = config.uds is None and _somebody_listens(config.host, config.port)
    except OSError as error:
        detail = f"{config.host} is no address here ({error.strerror}): use --host"
        return Finding("software", "daemon", "problem", detail)
    if taken:
        return Finding("software", "daemon", "warning", f"another program has port {config.port}: use --port")
    return Finding("software", "daemon", "fine", "none runs; start one with: lichen serve")


def _somebody_listens(host: str, port: int) -> bool:
    """Raises OSError for a host name that means nothing."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(address) == 0
