"""What the measurements do as commands: measure, keep the result, show it, and say by the exit code how it went."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from bench.certificate import save
from lichen.errors import LichenError

Record = dict[str, Any]


def carry_out(
    name: str,
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace], Record],
    *,
    tables: Callable[[Record], Sequence[str]],
    line: Callable[[Record], dict[str, Any]],
    good: Callable[[Record], bool] = lambda record: bool(record["status"] == "ok"),
) -> int:
    """Print the tables and one JSON line of a measurement that is saved, unless `no_save`, and published, if `publish`.

    name: of the module in bench/. line: what the JSON line says besides name and result. Returns the exit code: 1 when
    the result is not good, or when there is none, which is said in one sentence.
    """
    try:
        record = measure(options)
    except LichenError as error:
        print(error, file=sys.stderr)
        return 1
    path = None if getattr(options, "no_save", False) else save(record)
    for table in tables(record):
        print(table)
    if path is not None and getattr(options, "publish", False):
        from bench.report import publish

        publish([path])
    print(json.dumps({"bench": name, "result": path and path.name, **line(record)}))
    return 0 if good(record) else 1
