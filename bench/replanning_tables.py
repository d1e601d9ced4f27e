"""Results of `bench/replanning.py`: violations by phase and in all, ratios, and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.table import Rows, markdown, number
from bench.trace import FAULTS, fewer

SUBJECT = "replanning"
AIM = 3.0  # times fewer violations


def conclude(record: dict[str, Any]) -> None:
    """Totals of each server, the best fixed plan, and how many times fewer violations replanning has."""
    phases = [one["name"] for one in record["phases"]]
    record["totals"] = totals(record["runs"], phases)
    found = record["totals"]
    fixed = [name for name in found if name.startswith("fixed")]
    record["best_fixed"] = min(fixed, key=lambda name: found[name]["violations"], default=None)
    own = found.get(SUBJECT)
    record["ratios"] = {}
    record["dropped"] = None if own is None else own["dropped"]
    if own is not None:
        record["ratios"] = {
            name: fewer(one["violations"], own["violations"])
            for name, one in found.items()
            if name == record["best_fixed"] or not (name == SUBJECT or name.startswith("fixed"))
        }
    record["kept"] = (
        bool(record["ratios"]) and min(record["ratios"].values()) >= AIM and not record["dropped"]
    )
    if any(one["status"] != "ok" for one in (*record["runs"], *record["starts"])):
        record["status"] = "failed"


def totals(runs: Sequence[dict[str, Any]], phases: Sequence[str]) -> dict[str, dict[str, int]]:
    """Sums over the phases, of servers that went through all of them."""
    found: dict[str, dict[str, int]] = {}
    for name in dict.fromkeys(one["server"] for one in runs):
        own = [one for one in runs if one["server"] == name]
        if [one["phase"] for one in own] == list(phases):
            found[name] = {key: sum(one[key] for one in own) for key in ("requests", "violations", *FAULTS)}
    return found


def phase_rows(record: dict[str, Any]) -> Rows:
    """Header and a row for each phase and server."""
    rows: Rows = [
        ["phase", "server", "requests", "violations", *FAULTS, "TTFT p50 ms", "p95", "ITL p50 ms", "most MB"]
    ]
    for phase in record["phases"]:
        for one in record["runs"]:
            if one["phase"] == phase["name"]:
                rows.append(
                    [
                        phase["name"],
                        record["servers"][one["server"]]["title"],
                        *(str(one[key]) for key in ("requests", "violations", *FAULTS)),
                        number(one["ttft_p50_ms"], 0),
                        number(one["ttft_p95_ms"], 0),
                        number(one["itl_p50_ms"]),
                        number(one["rss_mb"], 0),
                    ]
                )
    return rows


def server_rows(record: dict[str, Any]) -> Rows:
    """Header and a row for each server: all phases together, and how many times fewer replanning has."""
    rows: Rows = [["server", "requests", "violations", *FAULTS, "violations ÷ replanning's"]]
    for name, one in record["totals"].items():
        rows.append(
            [
                record["servers"][name]["title"],
                *(str(one[key]) for key in ("requests", "violations", *FAULTS)),
                number(record["ratios"].get(name), 2),
            ]
        )
    return rows


def body(record: dict[str, Any]) -> list[str]:
    """The section of docs/benchmarks.md."""
    limits = record["limits"]
    phases = "; ".join(
        f"{one['name']}: {one['users']} users, {one['prompt']} prompts, one every {one['period']:g} s each, "
        f"{one['seconds']:g} s"
        for one in record["phases"]
    )
    changes = [line for start in record["starts"] for line in start.get("said", ())]
    pressure = "" if record["settings"]["neighbour"] else " Nothing pressed on memory in this run."
    return [
        f"{phases}. A request is late when its first token comes {limits['ttft']:g} s after it was due, slow with more than "
        f"{1e3 * limits['itl']:.0f} ms a token in the mean, heavy when in the last phase the server holds more than "
        f"{limits['memory'] / 1e6:.0f} MB at its end, dropped without a whole answer.{pressure}",
        markdown(server_rows(record), left=1),
        markdown(phase_rows(record)),
        "\n".join(f"- {line}" for line in changes) if changes else "The plan did not change.",
    ]
