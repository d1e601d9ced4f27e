"""The arithmetic of the benchmarks of plans: errors, picks, what counts of a load, violations."""

from __future__ import annotations

import json
import sys
from typing import Any

import msgspec
import pytest

from bench import foretold, intent_tables, predictions, replanning_tables, trace
from bench.intents import cases
from bench.neighbour import PIECE, Held
from bench.replanning import judged_phase
from bench.stream import Exchange
from bench.traffic import Traffic, Visits, reckon, tokens_within
from lichen.devices.pace import Plan
from lichen.devices.wish import parts_of, wish
from lichen.runtime.memory import resident


def answered(started: float, first: float, gap: float, tokens: int) -> Exchange:
    """A streamed answer of so many tokens, as a client records it."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    arrivals = [(started, head)]
    at = started + first
    for number in range(tokens):
        event = {"choices": [{"delta": {"content": f"w{number} "}, "finish_reason": None}]}
        arrivals.append((at + number * gap, b"data: " + json.dumps(event).encode() + b"\n\n"))
    usage = {"completion_tokens": tokens, "prompt_tokens": 50, "prompt_tokens_details": {"cached_tokens": 20}}
    at += (tokens - 1) * gap
    arrivals.append((at, b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"))
    arrivals.append((at, b"data: [DONE]\n\n"))
    return Exchange(started=started, finished=at, arrivals=arrivals)


def run(
    load: str, layout: str, *, slots: int = 1, kl: float = 0.0, **numbers: tuple[float, float]
) -> dict[str, Any]:
    """A pair of a plan and a load; numbers: predicted and measured."""
    both = {"ttft": (1.0, 1.0), "ttft_p95": (1.0, 1.0), "itl": (0.1, 0.1), "rate": (10.0, 10.0)}
    both |= {"memory": (100, 100), "work": (0.1, 0.1), **numbers}
    return {
        "plan": msgspec.to_builtins(Plan(layout=layout, threads=2, slots=slots, context=1024)),
        "load": load,
        "kl": kl,
        "status": "ok",
        "errors": [],
        "seconds": 10.0,
        "predicted": {name: pair[0] for name, pair in both.items()},
        "measured": {name: pair[1] for name, pair in both.items()},
    }


def test_errors_are_relative_to_what_was_measured_and_memory_counts_once_a_plan() -> None:
    runs = [
        run("alone", "source", ttft=(0.5, 1.0), memory=(104, 100)),
        run("few", "source", ttft=(1.5, 1.0), memory=(104, 100)),
        run("alone", "f16", ttft=(0.9, 1.0), memory=(99, 100)),
        {**run("few", "f16"), "status": "failed"},
    ]
    found = foretold.errors(runs)
    assert found["ttft"]["n"] == 3
    assert found["ttft"]["median"] == pytest.approx(0.5)
    assert found["ttft"]["p90"] == pytest.approx(0.5)
    assert found["ttft"]["signed_median"] == pytest.approx(-0.1)
    assert not found["ttft"]["kept"] and found["itl"]["kept"]
    assert found["memory"]["n"] == 2 and found["memory"]["median"] == pytest.approx(0.025)


def test_a_pick_costs_what_was_measured_of_it() -> None:
    runs = [
        run("crowd", "source", rate=(20.0, 10.0)),
        run("crowd", "q8_0", rate=(15.0, 16.0), kl=0.005),
        run("crowd", "q4_0", rate=(99.0, 99.0), kl=0.4),  # loses too much to count
        run("alone", "source"),
    ]
    picks = {one["intent"]: one for one in foretold.picks(runs, ["crowd", "alone"])}
    wrong = picks["throughput"]
    assert (wrong["load"], wrong["of"]) == ("crowd", 2)
    assert wrong["pick"]["layout"] == "source" and wrong["best"]["layout"] == "q8_0"
    assert wrong["ratio"] == pytest.approx(1.6) and not wrong["kept"]
    assert picks["battery"]["ratio"] == pytest.approx(0.9 * 16 / 10), "no less work a token, and slow"


def test_a_search_takes_all_measured_seconds() -> None:
    assert foretold.search_seconds([run("alone", "source")] * 6, 12.0) == {
        "fingerprint_s": 12.0,
        "exhaustive_s": 60.0,
        "ratio": 5.0,
    }


def test_the_grid_has_forty_pairs_and_each_plan_once() -> None:
    grid = predictions.plan_grid(("source", "q8_0", "f16"), 2, 2048)
    plans = [plan for plan, _ in grid]
    assert len(plans) == len(set(plans))
    assert sum(len(loads) for _, loads in grid) >= 40
    assert {name for _, loads in grid for name in loads} == set(predictions.LOADS)


def test_only_the_stretch_counts_in_which_everybody_is_there() -> None:
    visits = Visits(
        exchanges=[answered(0.0, 1.0, 0.5, 5), answered(4.0, 0.5, 0.25, 5), answered(9.0, 0.5, 0.25, 5)],
        began=3.0,
        ended=9.6,
    )
    found = reckon(visits)
    assert found is not None
    assert found.ttft == pytest.approx(0.5) and found.itl == pytest.approx(0.25)
    assert found.requests == 2 and found.tokens == 15
    assert found.rate == pytest.approx((5 + 1) / 6.6), "of the last answer one token came in time"
    assert (found.prompt, found.answer, found.shared) == (50, 5, 20)
    load = Traffic(name="few", users=4).load(prompt=50, answer=5, shared=20)
    assert load.fresh == 30


def test_pieces_stand_for_as_many_tokens_each() -> None:
    from bench.answer import read_answer

    one = answered(0.0, 1.0, 1.0, 4)
    answer = read_answer(one)
    assert tokens_within(one, answer, 1.5, 3.5) == pytest.approx(2.0)


LIMITS = trace.Limits(ttft=1.0, itl=0.2, memory=500)


def asked(due: float, one: Exchange | None, phase: str = "crowd") -> trace.Asked:
    return trace.Asked(phase=phase, due=due, exchange=one)


def test_each_request_is_judged_by_when_it_was_due() -> None:
    waits = answered(10.0, 0.5, 0.1, 5)
    assert trace.judge(asked(10.0, waits), LIMITS, None).faults == ()
    assert trace.judge(asked(9.0, waits), LIMITS, None).faults == ("late",), "it waited for its turn before"
    slow = answered(10.0, 0.5, 0.3, 5)
    assert trace.judge(asked(10.0, slow), LIMITS, lambda _: 501).faults == ("slow", "heavy")
    cut = Exchange(started=1.0, finished=2.0, arrivals=slow.arrivals[:3])
    assert trace.judge(asked(1.0, cut), LIMITS, None).faults == ("dropped",)
    assert trace.judge(asked(1.0, None), LIMITS, None).faults == ("late",)


def test_violations_are_requests_and_memory_counts_only_under_pressure() -> None:
    requests = [asked(10.0, answered(10.0, 2.0, 0.3, 5)), asked(10.0, answered(10.0, 0.5, 0.1, 5))]
    samples = [(0.0, 400), (10.2, 600)]
    easy = judged_phase(requests, LIMITS, samples, pressed=False)
    assert (easy["requests"], easy["violations"], easy["late"], easy["slow"], easy["heavy"]) == (
        2,
        1,
        1,
        1,
        0,
    )
    hard = judged_phase(requests, LIMITS, samples, pressed=True)
    assert (hard["violations"], hard["heavy"]) == (2, 2)
    assert trace.at_moment(samples, 10.1) == 400 and trace.at_moment(samples, 11.0) == 600


def test_every_server_is_asked_at_the_same_moments() -> None:
    phase = trace.Phase(name="crowd", users=16, period=8.0, seconds=40.0)
    first, again = trace.moments(phase, 1), trace.moments(phase, 1)
    assert first == again != trace.moments(phase, 2)
    assert all(0 <= moment < 40 for own in first for moment in own)
    assert all(own == sorted(own) for own in first) and min(map(len, first)) >= 4


def phase_run(server: str, phase: str, violations: int, dropped: int = 0) -> dict[str, Any]:
    faults = {"late": violations - dropped, "slow": 0, "heavy": 0, "dropped": dropped}
    return {
        "server": server,
        "phase": phase,
        "status": "ok",
        "requests": 100,
        "violations": violations,
        **faults,
    }


def test_replanning_is_compared_with_the_best_fixed_plan() -> None:
    record: dict[str, Any] = {"status": "ok", "phases": [{"name": "quiet"}, {"name": "crowd"}], "starts": []}
    counts = {"replanning": (0, 10), "fixed_1": (0, 80), "fixed_2": (5, 30), "llama_default": (0, 40)}
    record["runs"] = [
        phase_run(name, phase, number)
        for name, numbers in counts.items()
        for phase, number in zip(("quiet", "crowd"), numbers, strict=True)
    ]
    replanning_tables.conclude(record)
    assert record["best_fixed"] == "fixed_2"
    assert record["ratios"] == {"fixed_2": 3.5, "llama_default": 4.0} and record["kept"]
    record["runs"][1] = phase_run("replanning", "crowd", 10, dropped=1)
    replanning_tables.conclude(record)
    assert record["dropped"] == 1 and not record["kept"], "a dropped request is one too many"
    assert trace.fewer(7, 0) == 7.0


def test_an_intent_keeps_its_aims_only_with_a_layout_that_keeps_the_file() -> None:
    ratios = {
        "peak_rss_mb": {"median": 0.6},
        "tokens_per_second": {"median": 0.95},
        "ttft_p50_ms": {"median": 0.65},
    }
    assert intent_tables.verdict("memory", ratios, 0.004)["kept"]
    assert not intent_tables.verdict("memory", ratios, 0.011)["kept"]
    assert intent_tables.verdict("latency", ratios, 0.0)["kept"], "either of both is enough"
    assert not intent_tables.verdict("throughput", ratios, 0.0)["kept"]
    assert not intent_tables.verdict("throughput", {}, 0.0)["kept"], "what was not measured is not kept"


def test_what_a_case_asks_for_is_a_wish() -> None:
    for case in cases(2048, quick=True):
        found = wish(case.intent, parts_of(case.objectives))
        assert found.load.users == case.scenario.clients
        assert case.rivals[0].name == intent_tables.REFERENCE


@pytest.mark.skipif(
    sys.platform != "linux", reason="it writes to each page, which others may count differently"
)
def test_a_neighbour_takes_what_is_left_and_gives_it_back() -> None:
    free = [10 * PIECE]
    held = Held(7 * PIECE, 2 * PIECE, lambda: free[0])
    before = resident()
    held.turn()
    assert held.size == 2 * PIECE, "no more than it may"
    assert resident() - before > 1.9 * PIECE, "all of it is in memory"
    free[0] = 6 * PIECE
    held.turn()
    assert held.size == PIECE
    free[0] = 0
    held.turn()
    assert held.size == 0


def foretold_record() -> dict[str, Any]:
    record: dict[str, Any] = {
        "runs": [run("alone", "source"), run("alone", "f16", rate=(12.0, 10.0))],
        "loads": [{}],
    }
    record["errors"] = foretold.errors(record["runs"])
    record["picks"] = foretold.picks(record["runs"], ["alone"])
    record["search"] = foretold.search_seconds(record["runs"], 4.0)
    return record


def test_a_section_is_made_of_a_record() -> None:
    text = "\n".join(foretold.body(foretold_record()))
    assert "tokens a second" in text and "5x" in text


@pytest.mark.slow  # matplotlib is imported
def test_the_same_numbers_give_the_same_picture(tmp_path: Any) -> None:
    from bench.pictures import draw_predictions

    written = draw_predictions(foretold_record(), tmp_path)
    first = written[0].read_bytes()
    assert draw_predictions(foretold_record(), tmp_path)[0].read_bytes() == first
