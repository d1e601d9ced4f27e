"""Results as rows of text: aligned for the terminal, piped for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Rows = list[list[str]]


def number(value: float | None, digits: int = 1, unit: str = "") -> str:
    """A number for a table, or a dash for none."""
    return "–" if value is None else f"{value:,.{digits}f}{unit}"


def serving_rows(record: dict[str, Any]) -> Rows:
    """Header and one row for each scenario and server; the last columns are the first server's ratios to it."""
    names = list(record["servers"])
    subject = record["servers"][names[0]]["title"]
    rows: Rows = [
        [
            "load", "server", "tokens/s", "TTFT p50 ms", "TTFT p95 ms", "gap p50 ms", "gap p95 ms",
            "peak RSS MB", "≥ GB/s", f"{subject} ÷ it, tokens/s", "p95 TTFT",
        ]
    ]  # fmt: skip
    for scenario in record["scenarios"]:
        for name in names:
            cell = record["summary"][scenario["name"]][name]
            ratios = record["ratios"][scenario["name"]].get(name, {})
            rows.append(
                [
                    scenario["name"],
                    record["servers"][name]["title"],
                    number(cell["tokens_per_second"]),
                    number(cell["ttft_p50_ms"], 0),
                    number(cell["ttft_p95_ms"], 0),
                    number(cell["gap_p50_ms"]),
                    number(cell["gap_p95_ms"]),
                    number(cell["peak_rss_mb"], 0),
                    number(cell["bandwidth_gb_s"]),
                    number(ratios.get("tokens_per_second", {}).get("median"), 2),
                    number(ratios.get("ttft_p95_ms", {}).get("median"), 2),
                ]
            )
    return rows


def prefix_rows(record: dict[str, Any]) -> Rows:
    """Header and a row for each server: time to first token on a shared prefix, cold and warm."""
    rows: Rows = [["load", "server", "cold TTFT ms", "warm TTFT p50 ms", "warm ÷ cold"]]
    for scenario in record["scenarios"]:
        if scenario["prompt"] != "shared":
            continue
        for name, described in record["servers"].items():
            cell = record["summary"][scenario["name"]][name]
            share = cell["warm_ttft_share"]
            rows.append(
                [
                    scenario["name"],
                    described["title"],
                    number(cell["cold_ttft_ms"], 0),
                    number(cell["ttft_p50_ms"], 0),
                    number(None if share is None else share * 100, 1, " %"),
                ]
            )
    return rows


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; the first two to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with numbers to the right."""
    header, *body = rows
    rule = ["---" if column < 2 else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *body))
