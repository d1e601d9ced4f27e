"""The policy: a decision is a pure function of rules and facts, and says why."""

from __future__ import annotations

import datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.adapters.policy import Facts, Hours, Rules, decide, hours_of

RULES = Rules(hours=hours_of("22:00-06:30"))
GOOD = Facts(
    lessons=20, idle=600.0, plugged=True, memory=3_000_000_000, disk=3_000_000_000, now=datetime.time(23, 5)
)
TIMES = st.times().map(lambda time: time.replace(second=0, microsecond=0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lessons": 19}, "19 new lessons of the 20"),
        ({"working": "ftjob-1"}, "ftjob-1 has not ended"),
        ({"now": datetime.time(6, 30)}, "It is 06:30, and it learns from 22:00 to 06:30"),
        ({"now": datetime.time(12)}, "It is 12:00"),
        ({"plugged": False}, "battery"),
        ({"idle": 599.0}, "10.0 minutes ago, and it waits for 10"),
        ({"memory": 1_900_000_000}, "1.9 GB of memory are free, and it may need 2.0"),
        ({"disk": 0}, "disk space"),
    ],
)
def test_each_rule_alone_can_say_no_and_says_why(change: dict[str, object], words: str) -> None:
    assert decide(RULES, GOOD).learn
    decision = decide(RULES, msgspec.structs.replace(GOOD, **change))
    assert not decision.learn and words in decision.sentence


def test_what_was_forgotten_is_a_reason_without_new_lessons() -> None:
    decision = decide(RULES, msgspec.structs.replace(GOOD, lessons=0, forgotten=True))
    assert decision.learn and "forgotten" in decision.sentence
    assert decide(RULES, msgspec.structs.replace(GOOD, plugged=None)).learn, "no battery"
    battery = msgspec.structs.replace(RULES, on_battery=True)
    assert decide(battery, msgspec.structs.replace(GOOD, plugged=False)).learn


FACTS = st.builds(
    Facts,
    lessons=st.integers(0, 60),
    forgotten=st.booleans(),
    working=st.sampled_from([None, None, "ftjob-1"]),
    idle=st.floats(0, 5000),
    plugged=st.sampled_from([None, True, False]),
    memory=st.integers(0, 5_000_000_000),
    disk=st.integers(0, 5_000_000_000),
    now=TIMES,
)
RULE = st.builds(
    Rules,
    after=st.integers(0, 50),
    idle=st.floats(0, 3000),
    hours=st.none() | st.builds(Hours, TIMES, TIMES),
    on_battery=st.booleans(),
)


@given(RULE, FACTS)
def test_it_learns_only_where_every_rule_holds(rules: Rules, facts: Facts) -> None:
    decision = decide(rules, facts)
    assert decision.sentence.endswith(".") and "\n" not in decision.sentence
    assert decision.learn == (
        facts.working is None
        and (facts.forgotten or (facts.lessons >= rules.after and facts.lessons > 0))
        and (rules.hours is None or rules.hours.holds(facts.now))
        and (rules.on_battery or facts.plugged is not False)
        and facts.idle >= rules.idle
        and facts.memory >= rules.memory
        and facts.disk >= rules.disk
    )


@given(TIMES, TIMES, TIMES)
def test_of_two_complementary_stretches_one_holds(
    first: datetime.time, last: datetime.time, now: datetime.time
) -> None:
    hours = Hours(first, last)
    assert hours_of(str(hours)) == hours
    assert hours.holds(first) and (first == last or not hours.holds(last))
    if first != last:
        assert hours.holds(now) != Hours(last, first).holds(now)


@pytest.mark.parametrize("text", ["", "22:00", "24:00-01:00", "22:60-23:00", "22:00-23:00\n", "1:00-2:00"])
def test_what_are_no_hours_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no hours"):
        hours_of(text)
