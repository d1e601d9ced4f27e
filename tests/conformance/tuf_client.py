"""The client-under-test of theupdateframework/tuf-conformance, over lichen's verification and fetching.

    python -m tests.conformance.tuf_client --metadata-dir DIR init ROOT
    … --metadata-dir DIR --metadata-url URL refresh
    … --metadata-dir DIR --metadata-url URL --target-name PATH --target-base-url URL --target-dir DIR download

Exit code 0 or 1. The suite reads what is trusted as DIR/<role>.json; lichen's own record lies in DIR/record.
Run it with: pytest tuf_conformance --entrypoint "python -m tests.conformance.tuf_client"
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import httpx

from lichen.durable import write_file
from lichen.errors import LichenError, NotFound
from lichen.sync.trust.device import follow
from lichen.sync.trust.fetching import HttpFetcher, read
from lichen.sync.trust.record import Record
from lichen.sync.trust.verification import Found, Verification, check_bytes


class _Metadata(HttpFetcher):
    """A mirror whose metadata lies at the URL itself, not below `metadata/`."""

    def stream(self, name: str, limit: int, start: int = 0) -> AsyncIterator[bytes]:
        return super().stream(name.removeprefix("metadata/"), limit, start)


def main() -> int:
    """Parse the suite's command line and carry it out."""
    parser = argparse.ArgumentParser()
    for option in ("--metadata-dir", "--metadata-url", "--target-name", "--target-base-url", "--target-dir"):
        parser.add_argument(option)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    given = parser.parse_args()
    folder = Path(given.metadata_dir)
    try:
        if given.command == "init":
            _keep(folder, {"root": given.root.read_bytes()})
        else:
            asyncio.run(_update(folder, given))
    except LichenError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


async def _update(folder: Path, given: argparse.Namespace) -> None:
    verification = Verification(Record(folder / "record").load() or {}, datetime.datetime.now(datetime.UTC))
    async with httpx.AsyncClient() as client:
        mirror = _Metadata(client, given.metadata_url)
        try:
            await follow(verification.refresh(), mirror)
            if given.command == "download":
                found = await follow(verification.find(given.target_name), mirror)
                if found is None:
                    raise NotFound(f"There is no target {given.target_name}.")
                await _download(found, HttpFetcher(client, given.target_base_url), Path(given.target_dir))
        finally:
            _keep(folder, verification.remembered)


async def _download(found: Found, mirror: HttpFetcher, folder: Path) -> None:
    place = folder / quote(found.file.path, "")
    try:
        check_bytes(found, place.read_bytes())
        return  # it is here already
    except (OSError, LichenError):
        pass
    name = next(iter(found.names.values()), found.file.path)
    data = await read(mirror, quote(name, safe="/"), found.file.length)
    check_bytes(found, data)
    write_file(place, data)


def _keep(folder: Path, trusted: dict[str, bytes]) -> None:
    """Save what is trusted, and show it to the suite."""
    Record(folder / "record").save(trusted)
    for path in folder.glob("*.json"):
        if path.name.removesuffix(".json") not in {quote(role, "") for role in trusted}:
            path.unlink()
    for role, data in trusted.items():
        write_file(folder / f"{quote(role, '')}.json", data)


if __name__ == "__main__":
    sys.exit(main())
