"""Lessons in sequence as one table, with what must hold beside what was found, and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.table import Rows

Run = dict[str, Any]


def summarized(runs: Sequence[Run]) -> dict[str, Any]:
    """Means over the seeds by arm, and whether each aim is reached. Shares, not points."""
    arms = {
        arm: [run for run in runs if run["arm"] == arm] for arm in dict.fromkeys(run["arm"] for run in runs)
    }
    means = {
        arm: {name: _mean(found, name) for name in ("new", "final", "forgetting")}
        for arm, found in arms.items()
    }
    found: dict[str, Any] = {"arms": means, "aims": {}}
    if "ours" not in means or "peft" not in means:
        return found
    ours, peft = means["ours"], means["peft"]
    pruned = [run["pruned"] for run in arms["ours"]]
    found["pruned"] = {
        "bytes": round(fmean(one["bytes_after"] / one["bytes_before"] for one in pruned), 4),
        "lost": round(fmean(one["final_before"] - one["final_after"] for one in pruned), 4),
    }
    found["aims"] = {
        "new within 2 points of PEFT": ours["new"] >= peft["new"] - 0.02,
        "forgetting at most a quarter of PEFT's": ours["forgetting"] <= peft["forgetting"] / 4,
        "final ahead of all others": all(
            ours["final"] > means[arm]["final"] for arm in means if arm != "ours"
        ),
        "half the bytes at most": found["pruned"]["bytes"] <= 0.5,
        "0.5 points lost by pruning at most": found["pruned"]["lost"] <= 0.005,
    }
    return found


def sequence_rows(runs: Sequence[Run]) -> Rows:
    """Header and a row for each way to learn: the mean over the seeds, with the least and the greatest."""
    rows: Rows = [
        [
            "",
            "new skill, %",
            "final, %",
            "forgetting, points",
            "general loss",
            "adapter kB",
            "minutes a lesson",
        ]
    ]
    for arm in dict.fromkeys(run["arm"] for run in runs):
        found = [run for run in runs if run["arm"] == arm]
        rows.append(
            [
                arm,
                _range(found, lambda run: 100 * run["new"]),
                _range(found, lambda run: 100 * run["final"]),
                _range(found, lambda run: 100 * run["forgetting"]),
                _range(found, lambda run: run["general"][-1], digits=3),
                _range(found, lambda run: run["bytes"][-1] / 1000, digits=0),
                _range(found, lambda run: fmean(run["seconds"]) / 60),
            ]
        )
    return rows


def draw_sequence(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write sequence.svg and .png: the mean score on all lessons so far, after each, for every way; the paths."""
    from matplotlib import pyplot

    from bench.pictures import COLOURS, MARKERS

    folder.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context({"svg.hashsalt": "lichen", "svg.fonttype": "none", "font.size": 9}):
        figure, axis = pyplot.subplots(figsize=(5, 3), layout="constrained")
        arms = dict.fromkeys(run["arm"] for run in runs)
        for arm, colour, marker in zip(arms, COLOURS, MARKERS, strict=False):
            found = [run["scores"] for run in runs if run["arm"] == arm]
            lessons = range(1, len(found[0]) + 1)
            means = [100 * fmean(fmean(scores[number - 1]) for scores in found) for number in lessons]
            axis.plot(lessons, means, color=colour, marker=marker, label=arm)
        axis.set_xlabel("lessons learned")
        axis.set_ylabel("exact answers of all so far, %")
        axis.set_xticks(list(lessons))
        axis.set_ylim(bottom=0)
        axis.grid(visible=True, alpha=0.3)
        axis.legend(frameon=False)
        written = [folder / "sequence.svg", folder / "sequence.png"]
        figure.savefig(written[0], metadata={"Date": None})
        figure.savefig(written[1], dpi=110, metadata={"Software": None})
        pyplot.close(figure)
    return written


def _mean(runs: Sequence[Run], name: str) -> float:
    return round(fmean(run[name] for run in runs), 4)


def _range(runs: Sequence[Run], value: Callable[[Run], float], *, digits: int = 1) -> str:
    values = [value(run) for run in runs]
    mean = f"{fmean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"
