"""What an engine counts; the daemon's status, its metrics and `lichen top` show it."""

from __future__ import annotations

import msgspec


class Counters(msgspec.Struct):
    """What the engine has done since it started, and what it holds now (tokens, sequences, steps).

    ttft_s: seconds from submission to the first token, summed over `first_tokens` answers. drafts: how often
    drafted tokens were checked, each time `draft_tokens` of a sequence. adapter_switches: steps that had
    another adapter than the one before.
    """

    requests: int = 0
    completed: int = 0
    cancelled: int = 0
    failed: int = 0
    rejected: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    restored_tokens: int = 0
    spilled_tokens: int = 0
    completion_tokens: int = 0
    first_tokens: int = 0
    ttft_s: float = 0.0
    steps: int = 0
    adapter_switches: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    draft_accepted: int = 0
    waiting: int = 0
    running: int = 0
    free_slots: int = 0
    cells_used: int = 0
