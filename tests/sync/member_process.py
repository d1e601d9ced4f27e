"""A device of a fleet as a process that pulls and tells: `python member_process.py FOLDER BUNDLE BAD`.

BAD: sha256 of the version that says nothing in its trial. The engine is a stand-in; all else is real.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from lichen.errors import LichenError
from lichen.sync.store import Store
from lichen.sync.trust.device import Device
from lichen.sync.trust.member import Member
from tests.sync.update_bench import Oracle

EVERY_S = 0.4


async def main(folder: Path, bundle: Path, bad: str) -> None:
    """Enrol once, then live."""
    device = Device(folder / "fleet")
    device.enrol(bundle.read_bytes())
    oracle = Oracle()
    oracle.says[bad] = ""
    member = Member(
        device, folder / "fleet", Store(folder / "store"), oracle, running="0.1.0", clock=time.time
    )
    while True:
        for step in (member.pull, member.tell):
            try:
                await step()
            except LichenError as error:  # the link is bad; the next time may be better
                print(error, flush=True)
        await asyncio.sleep(EVERY_S)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
