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
            "load", "server", "runs", "tokens/s", "TTFT p50 ms", "TTFT p95 ms", "gap p50 ms", "gap p95 ms",
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
                    str(cell["runs"]),
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


def raw_rows(record: dict[str, Any]) -> Rows:
    """Header and two rows for each answer length: one HTTP client of lichen beside the raw loop."""
    rows: Rows = [["tokens", "rate", "lichen tokens/s", "raw loop tokens/s", "lichen ÷ raw", "range"]]
    names = (("decode_tokens_per_second", "tokens 2..n"), ("end_to_end_tokens_per_second", "end to end"))
    for limit, sides in record["summary"].items():
        for metric, title in names:
            ratio = record["ratios"][limit][metric] or {}
            spread = f"{ratio['low']:.3f}..{ratio['high']:.3f}" if ratio else "–"
            rows.append(
                [
                    limit,
                    title,
                    number(sides["lichen"][metric]),
                    number(sides["raw"][metric]),
                    number(ratio.get("median"), 3),
                    spread,
                ]
            )
    return rows


def structured_rows(record: dict[str, Any]) -> Rows:
    """Header and a row for each number of clients: rates of answers under a schema and without one."""
    rows: Rows = [["clients", "constrained tokens/s", "plain tokens/s", "constrained ÷ plain", "range"]]
    for clients, sides in record["summary"].items():
        ratio = record["ratios"][clients] or {}
        spread = f"{ratio['low']:.3f}..{ratio['high']:.3f}" if ratio else "–"
        rows.append(
            [
                clients,
                number(sides["constrained"]),
                number(sides["plain"]),
                number(ratio.get("median"), 3),
                spread,
            ]
        )
    return rows


def quantize_rows(record: dict[str, Any]) -> Rows:
    """Header and three rows a budget: llama.cpp's file without and with importance, and lichen's."""
    rows: Rows = [
        [
            "budget", "made by", "MB", "bits", "perplexity", "KL", "same top", "loss above lichen's, 10⁻³",
            "tokens/s",
        ]
    ]  # fmt: skip
    for row in record["summary"]:
        for way, shown in (("plain", "llama.cpp"), ("imatrix", "llama.cpp, imatrix"), ("lichen", "lichen")):
            cell, change = row[way], row["lower"].get(way)
            rows.append(
                [
                    row["budget"],
                    shown,
                    number(cell["bytes"] / 1e6, 2),
                    number(8 * cell["bytes"] / record["reference"]["weights"], 2),
                    number(cell["perplexity"], 3),
                    number(cell["kl"], 4),
                    f"{cell['same_top']:.1%}",
                    "" if change is None else f"{-1e3 * change['mean']:.1f} ± {1e3 * change['error']:.1f}",
                    number(cell["tokens_s"], 0),
                ]
            )
    return rows


def soak_rows(record: dict[str, Any]) -> Rows:
    """Header and a row for each thing that must not grow: its first and last quarter, and the change."""
    rows: Rows = [["what", "first quarter", "last quarter", "change"]]
    for title, values in record["drift"].items():
        change = values["change"]
        rows.append(
            [
                title,
                number(values["first"]),
                number(values["last"]),
                number(None if change is None else change * 100, 1, " %"),
            ]
        )
    return rows


def startup_rows(record: dict[str, Any]) -> Rows:
    """Header and a row for each server: seconds to ready and to the first token."""
    rows: Rows = [["server", "runs", "ready s", "first token s"]]
    for name, described in record["servers"].items():
        good = sum(entry["server"] == name and entry["status"] == "ok" for entry in record["runs"])
        cell = record["summary"][name]
        rows.append(
            [described["title"], str(good), number(cell["ready_s"], 2), number(cell["first_token_s"], 2)]
        )
    return rows


def import_rows(record: dict[str, Any]) -> Rows:
    """Header and a row for each of the packages whose import takes longest."""
    items = record["imports"]["top_ms"].items()
    return [["package", "ms"], *([name, number(spent)] for name, spent in items)]


def aligned(rows: Sequence[Sequence[str]], *, left: int = 2) -> str:
    """Columns of equal width; the first `left` to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def markdown(rows: Sequence[Sequence[str]], *, left: int = 2) -> str:
    """A Markdown table; the first `left` columns to the left, numbers to the right."""
    header, *body = rows
    rule = ["---" if column < left else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *body))
