"""The last hour of drafts by minute."""

from __future__ import annotations

from lichen.runtime.speculation.history import MINUTES, DraftHistory


def test_minutes_are_summed_and_forgotten_after_an_hour() -> None:
    history = DraftHistory()
    assert history.recent(0.0) == []
    for second, right in ((10, 3), (50, 4), (70, 0), (130, 1)):
        history.count(5, right, now=float(second))

    def recent(second: float) -> list[tuple[int, int, int]]:
        return [(one.minutes_ago, one.drafted, one.accepted) for one in history.recent(second)]

    assert recent(130) == [(2, 10, 7), (1, 5, 0), (0, 5, 1)]
    assert recent(60.0 * MINUTES) == [(59, 5, 0), (58, 5, 1)]
    history.count(2, 2, now=60.0 * (MINUTES + 1))
    assert recent(60.0 * (MINUTES + 1)) == [(59, 5, 1), (0, 2, 2)]
    assert recent(1e6) == []
