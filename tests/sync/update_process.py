"""A process that updates a machine and stops in one state, to be killed: arguments FOLDER and STATE."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from lichen.sync.updates.states import Update
from tests.sync.update_bench import MODEL, Machine
from tests.sync.weights import gguf_of, weights

OLD, NEW = (gguf_of(weights(layers=1, seed=seed)) for seed in (1, 2))


async def main(folder: str, state: str) -> None:
    """Have the old version, then go towards the new one as far as the state."""
    machine = Machine(Path(folder))
    machine.shop.add(MODEL, OLD)
    await machine.pull(MODEL)

    def stop(update: Update) -> None:
        if update.state == state:
            print("here", flush=True)
            time.sleep(60)

    machine.updater._on_change = stop
    machine.shop.add(MODEL, NEW)
    await machine.pull(MODEL)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
