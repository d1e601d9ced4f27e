"""Work in which much of the answer stands in the question: repeating, rewriting, filling forms, editing code."""

from __future__ import annotations

import itertools
from typing import Any

_PEOPLE = ("Anna Lind", "Omar Haddad", "Keiko Mori", "Tomas Novak")
_PLACES = ("Bergen", "Lisbon", "Graz", "Porto")
_THINGS = ("the ferry", "the night train", "the old bus", "the harbour tour")
_CODE = '''class {name}:
    """Keeps {items} by their number."""

    def __init__(self):
        self.{items} = {{}}

    def add(self, number, value):
        if number in self.{items}:
            raise KeyError(number)
        self.{items}[number] = value

    def remove(self, number):
        return self.{items}.pop(number)

    def count(self):
        return len(self.{items})
'''
_FORM: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "city": {"type": "string", "maxLength": 40},
        "booked": {"type": "string", "maxLength": 60},
        "text": {"type": "string", "maxLength": 600},
    },
    "required": ["name", "city", "booked", "text"],
    "additionalProperties": False,
}


def copying(count: int) -> dict[str, list[dict[str, Any]]]:
    """Kind of work -> at most `count` request bodies without model and limits; no two begin alike."""
    work: dict[str, list[dict[str, Any]]] = {"repeat": [], "rewrite": [], "form": [], "code": []}
    cases = itertools.product(_PEOPLE, _PLACES, _THINGS)
    for number, (person, place, thing) in enumerate(itertools.islice(cases, 0, None, 5)):
        letter = _letter(person, place, thing)
        items = ("tickets", "guests", "orders", "rooms")[number % 4]
        code = _CODE.format(name=f"{items.title()}Book{number}", items=items)
        asked = {
            "repeat": f"{number}. Repeat this letter exactly:\n\n{letter}",
            "rewrite": f"{number}. Rewrite this letter; only change Tuesday to Friday:\n\n{letter}",
            "form": f"{number}. Fill in the form from this letter, and copy the letter into its text:\n\n{letter}",
            "code": f"{number}. Write this class again, with a docstring in every method:\n\n{code}",
        }
        for kind, text in asked.items():
            body: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
            if kind == "form":
                schema = {"name": "form", "schema": _FORM, "strict": True}
                body["response_format"] = {"type": "json_schema", "json_schema": schema}
            if len(work[kind]) < count:
                work[kind].append(body)
    return work


def _letter(person: str, place: str, thing: str) -> str:
    return (
        f"Dear {person}, thank you for your letter from {place}. I was glad to read that {thing} was on time "
        f"and that you found the small house behind the church. We have kept two places on {thing} for you on "
        f"Tuesday, the twelfth of May, at half past nine. Please bring the blue suitcase, the keys and the map "
        f"of {place} that I gave you last year. On Tuesday evening we will eat together at the market hall."
    )
