"""What a request may carry although it changes nothing: fields, each with the values that have no effect.

`null` means "not given" whatever the field, as in OpenAI's API. Any other value is honoured or refused; none
is dropped in silence. Clients send our own answers back as they keep them, so messages have a table too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lichen.errors import UnsupportedField

# Values that change nothing (besides null): `...` means any value, a type any value of it.
Fields = Mapping[str, tuple[Any, ...]]

REQUEST: Fields = {  # of OpenAI's API
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "web_search_options": (),
    # Labels for the provider's own bookkeeping; they never change an answer.
    "user": (...,),
    "metadata": (...,),
    "safety_identifier": (...,),
    "prompt_cache_key": (...,),
    "prompt_cache_retention": (...,),
}
# What clients keep with an answer: OpenAI's has citations, and litellm adds what else a provider said.
MESSAGE: Fields = {"annotations": ([],), "provider_specific_fields": (dict,)}
CALL: Fields = {"provider_specific_fields": (dict,)}  # a tool call, and the function in it


def removed(raw: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """A body without its nulls and its fields without effect.

    Raises UnsupportedField for a field of the table with a value that would have an effect.
    """
    kept = {}
    for name, value in raw.items():
        if value is None:
            continue
        if name not in fields:
            kept[name] = value
        elif not _has_no_effect(value, fields[name]):
            raise UnsupportedField(f"lichen does not support {name} with this value.", param=name)
    return kept


def message_removed(message: Any, *, answered: bool) -> Any:
    """A message likewise. answered: it may be an answer of OpenAI's API that comes back.

    What is left for the body's type to refuse stays, so that the error names its place.
    """
    if not isinstance(message, dict):
        return message
    kept = _quietly_removed(message, MESSAGE if answered else {})
    if answered and isinstance(calls := kept.get("tool_calls"), list):
        kept["tool_calls"] = [_call_removed(call) for call in calls]
    return kept


def _call_removed(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    kept = _quietly_removed(call, CALL)
    if isinstance(function := kept.get("function"), dict):
        kept["function"] = _quietly_removed(function, CALL)
    return kept


def _quietly_removed(raw: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    return {
        name: value
        for name, value in raw.items()
        if value is not None and not (name in fields and _has_no_effect(value, fields[name]))
    }


def _has_no_effect(value: Any, allowed: tuple[Any, ...]) -> bool:
    if ... in allowed:
        return True
    return any(
        isinstance(value, one) if isinstance(one, type) else type(value) is type(one) and value == one
        for one in allowed
    )
