"""Results of `bench/intents.py`: medians, ratios paired by run, whether the aims are kept, and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.numbers import dig, median, paired_ratio, rounded
from bench.table import Rows, markdown, number

METRICS: dict[str, tuple[str, ...]] = {
    "tokens_per_second": ("tokens_per_second",),
    "decode_tokens_per_second": ("decode_tokens_per_second",),
    "ttft_p50_ms": ("ttft_ms", "p50"),
    "gap_p50_ms": ("gap_ms", "p50"),
    "peak_rss_mb": ("peak_rss_mb",),
}
KL_LIMIT = 0.01
# Of lichen to llama-server's defaults: (metric, at least or at most, ratio). Of latency's either is enough.
AIMS: dict[str, list[tuple[str, str, float]]] = {
    "throughput": [("tokens_per_second", "≥", 1.8)],
    "latency": [("tokens_per_second", "≥", 1.1), ("ttft_p50_ms", "≤", 0.7)],
    "memory": [("peak_rss_mb", "≤", 0.7), ("tokens_per_second", "≥", 0.9)],
}
EITHER = {"latency"}
TITLES = {"tokens_per_second": "tokens/s", "ttft_p50_ms": "TTFT", "peak_rss_mb": "RSS"}
REFERENCE = "llama_default"


def conclude(record: dict[str, Any]) -> None:
    """Medians over the good runs; ratios of lichen to each rival, paired by run; and whether aims are kept."""
    good = [one for one in record["runs"] if one["status"] == "ok"]
    record["summary"], record["ratios"], record["verdicts"] = {}, {}, {}
    for case in record["cases"]:
        intent = case["intent"]
        of_case = [one for one in good if one["intent"] == intent]
        names = list(dict.fromkeys(one["server"] for one in of_case))
        cells = {
            name: {metric: _by_run(of_case, name, path) for metric, path in METRICS.items()} for name in names
        }
        record["summary"][intent] = {
            name: {
                "runs": len(cell["tokens_per_second"]),
                **{metric: rounded(median(values.values()), 4) for metric, values in cell.items()},
            }
            for name, cell in cells.items()
        }
        own = cells.get(f"lichen_{intent}", {})
        record["ratios"][intent] = {
            name: {
                metric: ratio
                for metric in METRICS
                if (ratio := paired_ratio(own.get(metric, {}), cell[metric])) is not None
            }
            for name, cell in cells.items()
            if name != f"lichen_{intent}"
        }
        record["verdicts"][intent] = verdict(intent, record["ratios"][intent].get(REFERENCE, {}), case["kl"])
    if any(one["status"] != "ok" for one in (*record["runs"], *record["starts"])):
        record["status"] = "failed"


def _by_run(entries: Sequence[dict[str, Any]], server: str, path: tuple[str, ...]) -> dict[int, float | None]:
    return {one["run"]: dig(one, *path) for one in entries if one["server"] == server}


def verdict(intent: str, ratios: dict[str, Any], kl: float) -> dict[str, Any]:
    """Each aim with its ratio, and whether the intent kept what it is to keep; never with a layout above the limit."""
    aims = []
    for metric, relation, bound in AIMS[intent]:
        found = dig(ratios, metric, "median")
        kept = found is not None and (found >= bound if relation == "≥" else found <= bound)
        aims.append({"metric": metric, "aim": f"{relation} {bound:g}", "ratio": found, "kept": kept})
    enough = any if intent in EITHER else all
    return {
        "kl": kl,
        "counts": kl <= KL_LIMIT,
        "aims": aims,
        "kept": kl <= KL_LIMIT and enough(a["kept"] for a in aims),
    }


def intent_rows(record: dict[str, Any]) -> Rows:
    """Header and a row for each intent and server; the last columns are lichen's ratios to it."""
    rows: Rows = [
        ["intent", "server", "runs", "tokens/s", "TTFT p50 ms", "gap p50 ms", "peak RSS MB", "lichen ÷ it, tokens/s",
         "TTFT", "RSS"]
    ]  # fmt: skip
    for intent, servers in record["summary"].items():
        for name, cell in servers.items():
            ratios = record["ratios"][intent].get(name, {})
            rows.append(
                [
                    intent,
                    record["servers"][name]["title"],
                    str(cell["runs"]),
                    number(cell["tokens_per_second"]),
                    number(cell["ttft_p50_ms"], 0),
                    number(cell["gap_p50_ms"]),
                    number(cell["peak_rss_mb"], 0),
                    *(number(dig(ratios, metric, "median"), 2) for metric in TITLES),
                ]
            )
    return rows


def verdict_rows(record: dict[str, Any]) -> Rows:
    """Header and a row for each intent: the plan, its KL, and the aims beside what was measured."""
    rows: Rows = [["intent", "plan", "KL to the file", "aims, to llama-server's defaults", "kept"]]
    for case in record["cases"]:
        found = record["verdicts"][case["intent"]]
        plan = case["plan"]
        told = "; ".join(
            f"{TITLES[one['metric']]} {number(one['ratio'], 2)} ({one['aim']})" for one in found["aims"]
        )
        rows.append(
            [
                case["intent"],
                f"{case['layout']}, {plan['slots']} slots, {plan['threads']} threads, chunks of {plan['chunk']}",
                f"{case['kl']:.4f} ± {case['kl_error']:.4f}" if case["positions"] else "0, the file as it is",
                told,
                ("yes" if found["kept"] else "no") if found["counts"] else "no, the layout loses too much",
            ]
        )
    return rows


def body(record: dict[str, Any]) -> list[str]:
    """The section of docs/benchmarks.md."""
    loads = "; ".join(f"{case['intent']} {case['load']['name']}" for case in record["cases"])
    return [
        f"Loads, as prompt, longest answer, clients: {loads}. Servers take turns, each started afresh; ratios are taken "
        f"within each run, then their median. Fingerprints of all layouts took {record['fingerprint_s']:.1f} s, before.",
        markdown(intent_rows(record)),
        "KL: mean over positions of passages, of the layout's predictions to those of the file, in nats a token.",
        markdown(verdict_rows(record), left=5),
    ]
