"""What a server must say of itself to be measured, and how its Python environment comes to be."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pkgutil
import shlex
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bench.peers
from lichen.errors import LichenError

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venv-peers"
SHOWN_PORT = 65535  # of commands that are only shown: a word stands for it, and no other number is like it


class BenchError(LichenError):
    """A server or a tool that the benchmark needs is missing or fell over."""

    code = "benchmark_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The same for every server. context: tokens of one client. slots: clients answered at once."""

    model: Path
    threads: int
    slots: int
    context: int
    port: int


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One server. Its file in `bench/peers/` holds it as `PEER`.

    home: its environment under `.venv-peers/`. requirement: what pip installs there; None for lichen
    itself, which runs in the environment of the benchmark. health: answers 200 when ready. extras: fields that its requests need besides the common ones.
    identify: Python code, run in its environment, that prints {"versions": {...}, "system_info": "..."}.
    """

    name: str
    title: str
    home: str
    requirement: str | None
    health: str
    arguments: Callable[[Settings], list[str]]
    identify: str
    extras: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def python(self) -> Path:
        """Its interpreter: `LICHEN_BENCH_<HOME>`, this one, or `.venv-peers/<home>`, made when missing.

        Raises BenchError when it cannot be made.
        """
        if given := os.environ.get(f"LICHEN_BENCH_{self.home.upper()}"):
            return Path(given)
        if self.requirement is None:
            return Path(sys.executable)
        return _environment(self.home, self.requirement)

    def flags(self) -> list[str]:
        """More flags for an experiment, from `LICHEN_BENCH_<HOME>_FLAGS`; they stand in the result."""
        return shlex.split(os.environ.get(f"LICHEN_BENCH_{self.home.upper()}_FLAGS", ""))

    def command(self, settings: Settings) -> list[str]:
        """The whole command line."""
        return [str(self.python()), *self.arguments(settings), *self.flags()]

    def shown_command(self, settings: Settings) -> str:
        """The command line without this machine's paths, for the result."""
        names = {str(settings.model): settings.model.name, str(SHOWN_PORT): "PORT"}
        arguments = [*self.arguments(dataclasses.replace(settings, port=SHOWN_PORT)), *self.flags()]
        shown = [names.get(part, part).replace(f"{ROOT}{os.sep}", "") for part in arguments]
        return shlex.join(["python", *shown])

    def identity(self) -> dict[str, Any]:
        """Versions and compile flags of its build. Raises BenchError when it cannot be asked."""
        result = subprocess.run(
            [str(self.python()), "-c", self.identify],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env=environment(),
        )
        if result.returncode != 0:
            raise BenchError(f"{self.title} does not work in its environment: {result.stderr.strip()[-300:]}")
        identity: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
        return identity


def environment() -> dict[str, str]:
    """This process's environment without lichen's settings, which would make its run a special one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LICHEN_")}
    return {**kept, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "0"}


def names() -> list[str]:
    """All servers, by file name; lichen first."""
    found = sorted(module.name for module in pkgutil.iter_modules(bench.peers.__path__))
    return sorted(found, key=lambda name: name != "lichen")


def load(name: str) -> Peer:
    """The server of that name. Raises BenchError naming those that there are."""
    if name not in names():
        raise BenchError(f"There is no server {name!r} to measure.", hint=f"There are: {', '.join(names())}.")
    peer: Peer = importlib.import_module(f"bench.peers.{name}").PEER
    return peer


def _environment(name: str, requirement: str) -> Path:
    """`.venv-peers/<name>` with the requirement installed; the marker is written last, so a cut install is redone."""
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"
    marker = folder / "installed.txt"
    if marker.is_file() and marker.read_text(encoding="utf-8") == requirement:
        return python
    print(f"installing {requirement} into {folder.relative_to(ROOT)} ...", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True, clear=True, symlinks=os.name != "nt")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement]
    result = subprocess.run(install, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BenchError(
            f"pip could not install {requirement}: {result.stderr.strip()[-300:]}",
            hint=f"Leave this server out with --servers, or point LICHEN_BENCH_{name.upper()} to a Python that has it.",
        )
    marker.write_text(requirement, encoding="utf-8")
    return python
