"""The flags that measurements share."""

from __future__ import annotations

import argparse

from lichen.devices.probe import probe

DEFAULT_MODEL = "smollm2-135m"


def model_flags(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the model and the threads. name: of the module in bench/."""
    flags = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)
    flags.add_argument("--model", default=DEFAULT_MODEL, help="a GGUF file, or a model of lichen's store")
    flags.add_argument("--threads", type=int, default=probe().physical_cores)
    return flags


def server_flags(
    name: str, description: str, *, runs: int, context: int, slots: int | None = None
) -> argparse.ArgumentParser:
    """Those of `model_flags`, and runs, context and (unless None) slots; these are their defaults.

    context: tokens of one client.
    """
    flags = model_flags(name, description)
    flags.add_argument("--runs", type=int, default=runs, help="of each side")
    flags.add_argument("--context", type=int, default=context, help="tokens of one client")
    if slots is not None:
        flags.add_argument("--slots", type=int, default=slots, help="clients that lichen answers at once")
    return flags
