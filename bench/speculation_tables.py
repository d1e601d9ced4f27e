"""Results of `bench.speculation` and `bench.distillation` as tables, and what the page says of them."""

from __future__ import annotations

from typing import Any

from bench.table import Rows, markdown, number


def speculation_rows(record: dict[str, Any]) -> Rows:
    """Header and a row for each layout and kind of work: rates without and with drafted tokens, and bounds."""
    rows: Rows = [
        ["layout", "work", "answers", "same", "plain tokens/s", "drafted", "drafted ÷ plain", "range",
         "llama-server plain", "drafted", "drafted ÷ its best", "accepted", "tokens a step", "attainable",
         "of it", "memory-bound (computed)"]
    ]  # fmt: skip
    for layout, found in record["layouts"].items():
        for kind, cell in found["summary"].items():
            share, rates, part = cell["accepted"], cell["rates"], cell["of_attainable"]
            rows.append(
                [
                    layout,
                    kind,
                    str(cell["answers"]),
                    str(cell["same"]),
                    number(rates["plain"]),
                    number(rates["drafted"]),
                    number(cell["ratio"], 2),
                    f"{cell['low']:.2f}..{cell['high']:.2f}",
                    number(rates.get("peer_plain")),
                    number(rates.get("peer_drafted")),
                    number(cell["peer_ratio"], 2),
                    number(None if share is None else share * 100, 0, " %"),
                    number(cell["tokens_a_step"], 2),
                    number(cell["attainable"], 2),
                    number(None if part is None else part * 100, 0, " %"),
                    number(cell["memory_bound_computed"], 2),
                ]
            )
    return rows


def crowd_rows(record: dict[str, Any]) -> Rows:
    """Header and a row for each layout: many clients at once, lies, and what steps of more tokens cost."""
    widths = ("2", "4", "8", "16")
    rows: Rows = [
        ["layout", "clients", "plain tokens/s", "drafted", "drafted ÷ plain", "range", "lies ÷ plain"]
        + [f"{width} tokens, plain steps" for width in widths]
    ]
    for layout, found in record["layouts"].items():
        many, steps = found["crowd"] or {}, found["step_s"]
        rows.append(
            [
                layout,
                str(many.get("clients", "–")),
                number(many.get("plain_tokens_per_second")),
                number(many.get("drafted_tokens_per_second")),
                number(many.get("ratio"), 2),
                f"{many['low']:.2f}..{many['high']:.2f}" if many else "–",
                number(found["liar_ratio"], 3),
                *(number(steps[width] / steps["1"], 2) for width in widths),
            ]
        )
    return rows


def distillation_rows(record: dict[str, Any]) -> Rows:
    """Header and a row for each domain and moment: the first guesses that are right, and rates."""
    rows: Rows = [
        ["when", "questions of", "first guesses right", "plain tokens/s", "first head", "head of then",
         "÷ plain", "÷ first head"]
    ]  # fmt: skip
    for one in record["speed"]:
        right = record["summary"].get(one["when"], {}).get(one["domain"])
        rows.append(
            [
                one["when"],
                one["domain"],
                number(None if right is None else 100 * right, 1, " %"),
                number(one["plain"]),
                number(one["fresh"]),
                number(one["drafted"]),
                number(one["drafted"] / one["plain"], 2),
                number(one["drafted"] / one["fresh"], 2),
            ]
        )
    return rows


def _aims(record: dict[str, Any]) -> str:
    """What was aimed at, and whether it was reached, as a list."""
    return "\n".join(
        f"- {line['aim']}: {line['value']:.3f}, {'reached' if line['reached'] else '**missed**'}"
        for line in record["verdicts"]
    )


def speculation_body(record: dict[str, Any]) -> list[str]:
    """What the page says of a result of `bench.speculation`."""
    settings = record["settings"]
    trials = "; ".join(
        f"{name}: "
        + ", ".join(f"{setting} {rate:.0f}" for setting, rate in layout["trial"].items())
        + f" tokens/s, so {layout['peer_setting']}"
        for name, layout in record["layouts"].items()
        if "trial" in layout
    )
    body = [
        f"At most {settings['questions']} questions of each kind of work, answers of at most {settings['tokens']} tokens, "
        f"greedy, drafts by {settings['drafters']}; every side answers each question in turn. Rates are of tokens 2..n over "
        "all answers of a kind, ranges those of single answers. Attainable is what somebody would reach who knows "
        "beforehand how reliable each kind of draft is, but not which one is right, at the measured cost of steps; the "
        "last column is the same for **computed** costs of a device whose memory is the bottleneck, where eight tokens "
        "cost what one costs.",
        markdown(speculation_rows(record), left=2),
        markdown(crowd_rows(record), left=1),
    ]
    if trials:
        body.append(f"llama-server's settings in a trial on copying ({trials}).")
    return [*body, "Aimed at:", _aims(record)]


def distillation_body(record: dict[str, Any]) -> list[str]:
    """What the page says of a result of `bench.distillation`."""
    settings, learning, gaps = record["settings"], record["learning"], record["gap_p95_ms"]
    restart = record["restart"]
    return [
        f"{settings['minutes']:g} minutes of traffic from {settings['clients']} clients of each domain, one after the "
        f"other; {learning['trainings']} trainings, {learning['swaps']} new heads, {learning['rollbacks']} taken back. "
        "First guesses right, and rates, are of questions that are never learned from.",
        markdown(distillation_rows(record), left=2),
        "![First guesses right over time](img/distillation.svg)",
        f"95 % of the gaps between two tokens were below {gaps['quiet']} ms while nothing was trained and below "
        f"{gaps['learning']} ms during trainings. After a restart version {restart['version']} serves again.",
        "Aimed at:",
        _aims(record),
    ]
