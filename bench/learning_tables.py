"""Results of the benches of learning as tables, and what the page says of them."""

from __future__ import annotations

from typing import Any

from bench.numbers import dig
from bench.sequence_table import sequence_rows
from bench.table import Rows, markdown, number


def learning_speed_rows(record: dict[str, Any]) -> Rows:
    """Header and a row for each side: its speed, memory and score, and lichen's ratios to it."""
    rows: Rows = [
        [
            "trainer", "tokens/s", "peak MB of the steps", "of the process", "held-out loss", "exact",
            "lichen ÷ it, tokens/s", "range", "memory", "of the process",
        ]
    ]  # fmt: skip
    for side, cell in record["summary"].items():
        ratio = record["ratios"].get(side, {})
        speed = ratio.get("speed")
        rows.append(
            [
                side,
                number(cell["tokens_per_second"]),
                number(cell["peak_training_mb"], 0),
                number(cell["peak_mb"], 0),
                number(cell["held_out_loss"], 3),
                f"{cell['exact']:.1%}",
                number(speed and speed["median"], 2),
                f"{speed['low']:.2f}..{speed['high']:.2f}" if speed else "–",
                *(number(dig(ratio, name, "median"), 2) for name in ("peak_training_mb", "peak_mb")),
            ]
        )
    return rows


def learning_beside_rows(record: dict[str, Any]) -> Rows:
    """Header and a row for each kind of phase: gaps between the pieces of answers, with and without a trainer."""
    rows: Rows = [["phase", "gaps", "p50 ms", "p95 ms", "÷ idle"]]
    summary = record["summary"]
    for kind in ("idle", "training"):
        cell = summary[kind]
        ratio = summary["ratio"] if kind == "training" else None
        rows.append([kind, str(cell["n"]), number(cell["p50"]), number(cell["p95"]), number(ratio, 2)])
    return rows


def lesson_body(record: dict[str, Any]) -> list[str]:
    """What the page says of a result of `bench.learn lesson`."""
    rows = [
        ["step", "loss on held-out answers", "wrong answers, %", "loss on general answers", "its rise, %"]
    ]
    first = record["before"]["general"]
    for point in record["measured"]:
        values = (point["loss"], 100 * point["error"], point["general"], 100 * (point["general"] / first - 1))
        rows.append([str(point["step"]), *(f"{value:.3f}" for value in values)])
    aims = {
        "error at most half": record["after"]["error"] <= 0.5 * record["before"]["error"],
        "general loss at most 1 % up": record["after"]["general"] <= 1.01 * first,
    }
    return [
        f"banking77 as corrections, {record['settings']['minutes']:g} minutes in all; "
        f"{record['steps']} steps, {record['memory'] / 1e6:,.0f} MB at most.",
        markdown(rows, left=0),
        "![Error and general loss by step](img/lesson.svg)",
        _met(aims),
    ]


def sequence_body(record: dict[str, Any]) -> list[str]:
    """What the page says of a result of `bench.learn sequence`."""
    settings = record["settings"]
    seeds = len({run["seed"] for run in record["runs"]})
    body = [
        f"{settings['steps']} steps a lesson of at most {settings['lessons']} examples, {settings['measured']} questions a "
        f"lesson measured; {seeds} seed{'s' * (seeds > 1)}, means with the least and the greatest.",
        markdown(sequence_rows(record["runs"]), left=1),
        "![Score on all lessons so far](img/sequence.svg)",
    ]
    return [*body, _met(record["summary"]["aims"])] if record["summary"]["aims"] else body


def speed_body(record: dict[str, Any]) -> list[str]:
    """What the page says of a result of `bench.learning_speed`."""
    settings, first = record["settings"], record["first"]
    lesson = "banking77's questions" if settings["lesson"] == "banking" else "GSM8K's problems"
    differences = "; ".join(
        f"from {side} the first loss differs by {found['loss']:.1e} of it, the logits by {found['largest_logit']:.1e} "
        f"at most (their spread is {found['spread_of_logits']:.1f})"
        for side, found in first["differences"].items()
    )
    return [
        f"{settings['steps']} steps of {settings['batch']} of {settings['lessons']} lessons ({lesson}), rank "
        f"{settings['rank']}, {record['tokens']:,} tokens without padding; {settings['rounds']} rounds, in which the sides "
        "take turns. Medians; ratios are taken within each round. `peft` adapts the layers that lichen adapts, `peft-all` "
        f"those of all blocks. Held-out scores are of {settings['measured']} other questions, after the last step.",
        markdown(learning_speed_rows(record), left=1),
        f"Before the first step: {differences}.",
        _met(record["aims"]),
    ]


def beside_body(record: dict[str, Any]) -> list[str]:
    """What the page says of a result of `bench.learn_while_serving`."""
    settings, summary = record["settings"], record["summary"]
    return [
        f"One client that thinks for {settings['think']:g} s between answers of {settings['tokens']} tokens; "
        f"{settings['phases']} phases of {settings['seconds']:g} s of each kind, in turns.",
        markdown(learning_beside_rows(record), left=1),
        f"The trainer took {summary['trainer_steps_a_minute']:g} steps a minute beside the chat, and "
        f"{summary['trainer_steps_a_minute_alone']:g} while nobody chatted.",
    ]


def _met(aims: dict[str, bool]) -> str:
    return (
        "Aims: "
        + "; ".join(f"{aim}: {'reached' if met else '**missed**'}" for aim, met in aims.items())
        + "."
    )
