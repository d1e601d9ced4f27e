"""Plans put into action: measures what a plan needs to know, chooses one, and makes settings of it.

Settings that somebody gave stay as they are, and the plan is made around them. What the chosen layout needs
and is not here yet is told by `wanted`; until it is made, the best plan of what is here counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lichen.config import SETTINGS, Config, Effective, override
from lichen.devices import probe
from lichen.devices.cost import MemoryOf
from lichen.devices.curves import Fingerprint
from lichen.devices.intent import Objectives
from lichen.devices.pace import Plan
from lichen.devices.plan import Choice, Space, choose
from lichen.devices.schedule import Progress
from lichen.devices.telling import SETTINGS as PLANNED
from lichen.devices.telling import reasons, settings
from lichen.devices.verdict import Candidate
from lichen.devices.wish import Wish, parts_of, wish
from lichen.errors import ConfigError
from lichen.quant.gguf_check import GGUFSummary, check_gguf
from lichen.runtime import memory
from lichen.runtime.layouts import SOURCE, divergence, find, worth_measuring
from lichen.runtime.served_model import ModelOptions
from lichen.runtime.speculation.build import SpeculationOptions
from lichen.sync.download import hash_file

PROCESS_BYTES = 80_000_000  # of a daemon without a model: Python, the HTTP server, llama.cpp (docs/log.md)
BUDGET_S = 4.0  # to measure one layout, after its first round
ROUNDS = 3

Tell = Callable[[str, Progress], None]


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A model to plan for: its name, its file, and the sha256 of that ("" where nobody has hashed it)."""

    name: str
    path: Path
    sha256: str


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """A plan in action.

    asked: the model in the file that was asked for. config: with the plan's settings. path, sha256: of the
    file to load now. choice: the best of all that could be made here.
    now: the best of what is here, which is followed. base: the configuration before it. here: fingerprints
    of the layouts that are here.
    wanted: the layout that would be best and has to be made first; None if there is none. reasons: for
    people. wish: what it is for. given: settings that stay. space, fingerprints: what it was
    made of.
    """

    asked: Asked
    config: Config
    path: Path
    sha256: str
    choice: Choice
    now: Candidate
    base: Config
    here: tuple[Fingerprint, ...]
    wanted: str | None
    reasons: tuple[str, ...]
    wish: Wish
    given: Mapping[str, Any]
    space: Space
    fingerprints: tuple[Fingerprint, ...]


def wish_of(config: Config) -> Wish:
    """What a configuration's intent and objectives ask for. Raises ConfigError.

    Where they say nothing of users, there are as many as slots.
    """
    parts = parts_of(config.objectives or "")
    if "users" not in parts and "arrivals" not in parts:
        parts["users"] = str(config.slots)
    return wish(config.intent, parts)


def given_settings(effective: Effective) -> dict[str, Any]:
    """The settings among those that a plan makes which somebody gave, by name."""
    return {
        name: getattr(effective.config, name) for name in PLANNED if effective.origin[name].kind != "default"
    }


def plan_for(
    config: Config,
    asked: Asked,
    wanted: Wish,
    *,
    given: Mapping[str, Any],
    layouts: Sequence[str] = (),
    budget_s: float = BUDGET_S,
    tell: Tell = lambda layout, now: None,
) -> Planned:
    """Measure what is not known yet, and plan. Blocks for seconds where something has to be measured.

    given: settings that stay. layouts: to choose of, by default those that keep the quality. Raises
    ConfigError where nothing keeps the objectives, and what measuring raises.
    """
    if not asked.sha256:
        asked = msgspec.structs.replace(asked, sha256=hash_file(asked.path))
    summary = check_gguf(asked.path)
    names = list(layouts) or worth_measuring(summary)
    measured = fingerprints(config, asked, names, budget_s, tell)
    space = space_for(config, asked, summary, given)
    objectives = within_the_machine(wanted, config)
    best = choose(measured, wanted.load, intents=wanted.intents, objectives=objectives, space=space)
    layout = best.pick.plan.layout
    here = [one for one in measured if one.layout == SOURCE or find(config.home, asked.sha256, one.layout)]
    missing = layout not in {one.layout for one in here}
    choice = best
    if missing:
        choice = choose(here, wanted.load, intents=wanted.intents, objectives=objectives, space=space)
    planned = Planned(
        asked=asked,
        config=config,
        path=asked.path,
        sha256=asked.sha256,
        choice=best,
        now=choice.pick,
        base=config,
        here=tuple(here),
        wanted=layout if missing else None,
        reasons=reasons(best, wanted.load, wanted.intents, given),
        wish=wanted,
        given=dict(given),
        space=space,
        fingerprints=tuple(measured),
    )
    return with_plan(planned, choice.pick)


def with_plan(planned: Planned, better: Candidate) -> Planned:
    """The same with another plan of what is here."""
    present = find(planned.config.home, planned.asked.sha256, better.plan.layout)
    return msgspec.structs.replace(
        planned,
        now=better,
        config=override(planned.base, free_settings(better.plan, planned.given)),
        path=planned.asked.path if present is None else present[1],
        sha256=planned.asked.sha256 if present is None else present[0].sha256,
    )


def fingerprints(
    config: Config, asked: Asked, layouts: Sequence[str], budget_s: float, tell: Tell
) -> list[Fingerprint]:
    """What is known of each layout, measured where it is not known yet. Raises what measuring raises."""
    from lichen.runtime.fingerprints import take_fingerprint

    found = []
    for layout in layouts:
        taken = take_fingerprint(
            asked.path,
            asked.sha256,
            config.home,
            layout=layout,
            rounds=ROUNDS,
            budget_s=budget_s,
            progress=functools.partial(tell, layout),
        )
        if taken is not None:
            found.append(taken)
    return found


def space_for(config: Config, asked: Asked, summary: GGUFSummary, given: Mapping[str, Any]) -> Space:
    """What plans may be made of here."""
    fixed = {name: value for name, value in given.items() if name not in ("context", "speculation")}
    if given.get("speculation") == "off":
        fixed["draft"] = 0
    if fixed.get("threads") == 0:
        del fixed["threads"]  # "as many as there are" is what a plan decides
    trained = summary.context_train or config.context
    return Space(
        context=min(config.context, trained) if config.context else trained,
        cores=probe.probe().threads,
        fixed=fixed,
        divergence=divergence(config.home, asked.sha256),
        memory=process_bytes(summary),
    )


def within_the_machine(wanted: Wish, config: Config) -> Objectives:
    """The objectives, and never more memory than this machine has for it."""
    most = max(1, memory.available(config.memory_limit)) + PROCESS_BYTES
    asked = wanted.objectives.memory
    return msgspec.structs.replace(wanted.objectives, memory=most if asked is None else min(asked, most))


def process_bytes(summary: GGUFSummary) -> MemoryOf:
    """The bytes of a daemon that runs a plan: KV cache and buffers as the governor estimates them, weights
    as they were measured in their layout."""

    @functools.cache
    def rest(slots: int, context: int, batch: int, kv_type: str, draft: bool) -> int:
        speculation = SpeculationOptions(drafters="suffix" if draft else "off")
        options = ModelOptions(
            context=context, slots=slots, batch=batch, kv_type=kv_type, speculation=speculation
        )
        found = memory.estimate(summary, options)
        return found.kv + found.compute

    def held(fingerprint: Fingerprint, plan: Plan) -> int:
        model = fingerprint.weight_bytes + fingerprint.fixed_bytes
        return (
            PROCESS_BYTES + model + rest(plan.slots, plan.context, plan.batch, plan.kv_type, plan.draft > 0)
        )

    return held


def free_settings(plan: Plan, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a plan makes, without those that were given."""
    assert set(PLANNED) <= SETTINGS.keys(), "every setting of a plan is one of lichen's"
    return {name: value for name, value in settings(plan).items() if name not in given}


def refuse_without_intent(config: Config) -> None:
    """Raises ConfigError for objectives that no intent goes with: they would do nothing."""
    if config.objectives is not None and config.intent is None:
        raise ConfigError(
            "The setting objectives has no effect without an intent.", hint="Add --intent balanced."
        )
