"""Small pictures for the docs: serving by clients, a draft head over time, a lesson, and predictions of plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

PANELS = (("short", 64, "short prompts, 64 tokens"), ("long", 64, "1,000-token prompts, 64 tokens"))
COLOURS = ("#2f6f4f", "#b4581e", "#5b5f97", "#777777")
MARKERS = ("o", "s", "^", "D")
SCATTER = (
    ("ttft", "first token, ms", 1e3),
    ("itl", "between tokens, ms", 1e3),
    ("rate", "tokens a second", 1.0),
    ("memory", "peak memory, MB", 1e-6),
)


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write throughput and ttft as .svg and .png into `folder`; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        *_picture(
            record, folder / "throughput", "tokens_per_second", "tokens/s of all clients", 1.0, log=False
        ),
        *_picture(record, folder / "ttft", "ttft_p95_ms", "p95 of time to first token, s", 1e-3, log=True),
    ]


def _picture(
    record: dict[str, Any], stem: Path, metric: str, label: str, unit: float, *, log: bool
) -> list[Path]:
    # Without a fixed salt every drawing of the same numbers would differ, and so would the repository.
    with pyplot.rc_context({"svg.hashsalt": "lichen", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(1, len(PANELS), figsize=(8, 3), sharey=True, layout="constrained")
        for axis, (prompt, max_tokens, title) in zip(axes, PANELS, strict=True):
            clients: set[int] = set()
            for (name, server), colour, marker in zip(
                record["servers"].items(), COLOURS, MARKERS, strict=False
            ):
                points = _points(record, name, prompt, max_tokens, metric)
                clients.update(count for count, _ in points)
                axis.plot(
                    [count for count, _ in points],
                    [value * unit for _, value in points],
                    color=colour,
                    marker=marker,
                    label=server["title"],
                )
            axis.set_title(title)
            axis.set_xlabel("clients")
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted(clients), [str(count) for count in sorted(clients)])
            axis.minorticks_off()
            axis.grid(visible=True, alpha=0.3)
            if log:
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
        axes[0].set_ylabel(label)
        axes[0].legend(frameon=False)
        written = [stem.with_suffix(".svg"), stem.with_suffix(".png")]
        figure.savefig(written[0], metadata={"Date": None})
        figure.savefig(written[1], dpi=110, metadata={"Software": None})
        pyplot.close(figure)
    return written


def _points(
    record: dict[str, Any], server: str, prompt: str, max_tokens: int, metric: str
) -> list[tuple[int, float]]:
    """Clients and value of each measured load of a panel, fewest clients first."""
    points = []
    for scenario in record["scenarios"]:
        if scenario["prompt"] == prompt and scenario["max_tokens"] == max_tokens:
            value = record["summary"][scenario["name"]][server][metric]
            if value is not None:
                points.append((scenario["clients"], value))
    return sorted(points)


def draw_learning(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write how many first guesses of the draft head are right over time, as .svg and .png; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    curve = record["curve"]
    with pyplot.rc_context({"svg.hashsalt": "lichen", "svg.fonttype": "none", "font.size": 9}):
        figure, axis = pyplot.subplots(figsize=(6, 3), layout="constrained")
        minutes = [point["minutes"] for point in curve]
        for name, colour, marker in zip(curve[0]["acceptance"], COLOURS, MARKERS, strict=False):
            shares = [point["acceptance"][name][0] for point in curve]
            axis.step(minutes, shares, where="post", color=colour, marker=marker, label=name)
        turn = next((p["minutes"] for p in curve if p["traffic"] != curve[0]["traffic"]), None)
        if turn is not None:
            axis.axvline(turn, color="#777777", linestyle=":")
        axis.set_xlabel(f"minutes; traffic: {curve[0]['traffic']}, then {curve[-1]['traffic']}")
        axis.set_ylabel("first guesses right")
        axis.set_ylim(0, 1)
        axis.grid(visible=True, alpha=0.3)
        axis.legend(frameon=False)
        written = [folder / "distillation.svg", folder / "distillation.png"]
        figure.savefig(written[0], metadata={"Date": None})
        figure.savefig(written[1], dpi=110, metadata={"Software": None})
        pyplot.close(figure)
    return written


def draw_lesson(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write lesson.svg and .png: held-out error, and the general loss against what it was, by step."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = [point["step"] for point in record["measured"]]
    first = record["measured"][0]["general"]
    with pyplot.rc_context({"svg.hashsalt": "lichen", "svg.fonttype": "none", "font.size": 9}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
        errors = [100 * point["error"] for point in record["measured"]]
        left.plot(steps, errors, color=COLOURS[0], marker="o")
        left.set_title("wrong answers of the held-out, %")
        left.set_ylim(bottom=0)
        rises = [100 * (point["general"] / first - 1) for point in record["measured"]]
        right.plot(steps, rises, color=COLOURS[1], marker="o")
        right.axhline(1, color=COLOURS[3], linewidth=0.8)
        right.set_title("rise of the loss on general answers, %")
        for axis in (left, right):
            axis.set_xlabel("steps")
            axis.grid(visible=True, alpha=0.3)
        written = [folder / "lesson.svg", folder / "lesson.png"]
        figure.savefig(written[0], metadata={"Date": None})
        figure.savefig(written[1], dpi=110, metadata={"Software": None})
        pyplot.close(figure)
    return written


def draw_predictions(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write predictions.svg and .png: predicted beside measured, a panel for each metric, a colour for each layout."""
    folder.mkdir(parents=True, exist_ok=True)
    good = [run for run in record["runs"] if run["status"] == "ok"]
    layouts = sorted({run["plan"]["layout"] for run in good}, reverse=True)
    with pyplot.rc_context({"svg.hashsalt": "lichen", "svg.fonttype": "none", "font.size": 9}):
        figure, panels = pyplot.subplots(1, len(SCATTER), figsize=(11, 3), layout="constrained")
        for axis, (metric, title, unit) in zip(panels, SCATTER, strict=True):
            for layout, colour, marker in zip(layouts, COLOURS, MARKERS, strict=False):
                own = [run for run in good if run["plan"]["layout"] == layout]
                points = [(run["measured"][metric] * unit, run["predicted"][metric] * unit) for run in own]
                axis.scatter(*zip(*points, strict=True), s=14, color=colour, marker=marker, label=layout)
            ends = _ends([run[side][metric] * unit for run in good for side in ("measured", "predicted")])
            axis.plot(ends, ends, color=COLOURS[3], linewidth=0.8)
            for factor in (0.7, 1.3):
                axis.plot(
                    ends, [factor * end for end in ends], color=COLOURS[3], linewidth=0.5, linestyle=":"
                )
            axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, title=title, xlabel="measured")
            axis.grid(visible=True, alpha=0.3)
        panels[0].set_ylabel("predicted; dotted: ±30 %")
        panels[0].legend(frameon=False)
        written = [folder / "predictions.svg", folder / "predictions.png"]
        figure.savefig(written[0], metadata={"Date": None})
        figure.savefig(written[1], dpi=110, metadata={"Software": None})
        pyplot.close(figure)
    return written


def _ends(values: list[float]) -> tuple[float, float]:
    """A little beyond the least and the greatest."""
    return 0.8 * min(values, default=1.0), 1.25 * max(values, default=1.0)
