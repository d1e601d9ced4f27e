"""What predictions of plans are worth: errors, and what is lost by picking from them. Arithmetic alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import msgspec

from bench.numbers import percentile
from bench.table import Rows, number
from lichen.devices.cost import Prediction
from lichen.devices.intent import INTENTS, Intent, Objectives
from lichen.devices.pace import Plan
from lichen.devices.plan import best, cost, pacemaker, pareto
from lichen.devices.verdict import Candidate, broken

METRICS = ("ttft", "itl", "rate", "memory")
TITLES = {
    "ttft": "time to first token",
    "itl": "between tokens",
    "rate": "tokens a second",
    "memory": "peak memory",
}
AIMS = {"ttft": (0.15, 0.30), "itl": (0.15, 0.30), "rate": (0.15, 0.30), "memory": (0.05, 0.05)}
NEAR_BEST = 1.10


def errors(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each metric: median and 90th percentile of |predicted / measured - 1|, the median with its sign, how
    many, and whether that is within the aims. Memory is one number a plan."""
    found: dict[str, dict[str, Any]] = {}
    for metric in METRICS:
        signed = [one["predicted"][metric] / one["measured"][metric] - 1 for one in _of(metric, runs)]
        if not signed:
            continue
        shares = [abs(error) for error in signed]
        median, late = statistics.median(shares), percentile(shares, 90)
        aims = AIMS[metric]
        found[metric] = {
            "n": len(shares),
            "median": round(median, 4),
            "p90": round(late, 4),
            "largest": round(max(shares), 4),
            "signed_median": round(statistics.median(signed), 4),
            "kept": median <= aims[0] and late <= aims[1],
        }
    return found


def _of(metric: str, runs: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The runs that have a number of their own for a metric."""
    good = [one for one in runs if one["status"] == "ok"]
    if metric != "memory":
        return good
    return list({plan_of(one): one for one in good}.values())


def picks(runs: Sequence[dict[str, Any]], loads: Sequence[str]) -> list[dict[str, Any]]:
    """For each load and intent: the plan that predictions pick, the one that measurements do, and how many times the
    best plan's cost the pick's is, both as measured. Only plans within the default quality."""
    found = []
    for load in loads:
        good = [one for one in runs if one["load"] == load and one["status"] == "ok"]
        pairs = [(candidate(one, "predicted"), candidate(one, "measured")) for one in good]
        pairs = [pair for pair in pairs if "quality" not in broken(pair[0], Objectives())]
        if len(pairs) < 2:
            continue
        for intent in INTENTS:
            found.append({"load": load, "of": len(pairs), **_pick(pairs, intent)})
    return found


def _pick(pairs: Sequence[tuple[Candidate, Candidate]], intent: Intent) -> dict[str, Any]:
    predicted = [one for one, _ in pairs]
    measured = {one.plan: one.prediction for _, one in pairs}
    fastest = pacemaker([one for _, one in pairs], intent)
    costs = {plan: cost(found, intent, fastest) for plan, found in measured.items()}
    chosen = best(pareto(predicted), [intent]).plan
    least = min(costs, key=costs.__getitem__)
    return {
        "intent": intent,
        "pick": msgspec.to_builtins(chosen),
        "best": msgspec.to_builtins(least),
        "ratio": round(costs[chosen] / costs[least], 4),
        "kept": costs[chosen] <= NEAR_BEST * costs[least],
    }


def plan_of(run: dict[str, Any]) -> Plan:
    """The plan of a run."""
    return msgspec.convert(run["plan"], Plan)


def candidate(run: dict[str, Any], side: str) -> Candidate:
    """A run's plan with what was predicted or measured of it; both have the divergence of its layout."""
    numbers = {name: run[side][name] for name in ("ttft", "ttft_p95", "itl", "rate", "memory", "work")}
    return Candidate(plan_of(run), Prediction(**numbers, kl=run["kl"]))


def search_seconds(runs: Sequence[dict[str, Any]], fingerprint_s: float) -> dict[str, float]:
    """What it takes to know the best plan: fingerprints, or measuring each plan that was measured here."""
    spent = sum(one["seconds"] for one in runs)
    return {
        "fingerprint_s": round(fingerprint_s, 2),
        "exhaustive_s": round(spent, 1),
        "ratio": round(spent / fingerprint_s, 2) if fingerprint_s else math.inf,
    }


# ---- tables ---------------------------------------------------------------------------------------


def error_rows(record: dict[str, Any]) -> Rows:
    """Header and a row for each metric."""
    rows: Rows = [
        ["what", "pairs", "median error", "90th percentile", "largest", "signed median", "aim", "kept"]
    ]
    for metric, one in record["errors"].items():
        aims = AIMS[metric]
        rows.append(
            [
                TITLES[metric],
                str(one["n"]),
                *(f"{one[name]:.1%}" for name in ("median", "p90", "largest")),
                f"{one['signed_median']:+.1%}",
                f"≤ {aims[0]:.0%}, {aims[1]:.0%}",
                "yes" if one["kept"] else "no",
            ]
        )
    return rows


def pick_rows(record: dict[str, Any]) -> Rows:
    """Header and a row for each load and intent."""
    rows: Rows = [["load", "intent", "plans", "picked", "best as measured", "cost ÷ best"]]
    for one in record["picks"]:
        same = one["pick"] == one["best"]
        rows.append(
            [
                one["load"],
                one["intent"],
                str(one["of"]),
                short_plan(one["pick"]),
                "the same" if same else short_plan(one["best"]),
                number(one["ratio"], 3),
            ]
        )
    return rows


def short_plan(plan: dict[str, Any]) -> str:
    """What differs between the plans of this benchmark."""
    return f"{plan['layout']} {plan['slots']}s {plan['threads']}t c{plan['chunk']}"


def body(record: dict[str, Any]) -> list[str]:
    """The section of docs/benchmarks.md."""
    from bench.table import markdown

    search, chosen = record["search"], record["picks"]
    kept = sum(one["kept"] for one in chosen)
    plans = len({plan_of(one) for one in record["runs"]})
    return [
        f"{len(record['runs'])} pairs of {plans} plans and {len(record['loads'])} loads, on daemons started with each plan. "
        "Errors are |predicted ÷ measured - 1|; lengths of prompts and answers are those that the daemon counted. Memory is "
        "one number a plan: the daemon's largest resident set.",
        markdown(error_rows(record), left=1),
        "![Predicted beside measured](img/predictions.svg)",
        f"Fingerprints of all layouts took {search['fingerprint_s']:.1f} s, measuring these pairs {search['exhaustive_s']:.0f} "
        f"s ({search['ratio']:.0f}x). Of {len(chosen)} picks (each load and intent, of the plans that were measured under it), "
        f"{kept} are within {NEAR_BEST - 1:.0%} of the best by the intent's own cost, as measured:",
        markdown(pick_rows(record), left=2),
    ]
