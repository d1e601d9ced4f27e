"""Things that any chat model knows: what a training should not make it forget, measured in seconds.

A first look only; whether an adapter may be served is decided on more than this.
"""

from __future__ import annotations

from lichen.adapters.lesson_forms import Lesson

PAIRS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days are there in a week?", "There are seven days in a week."),
    ("Write one sentence about the sea.", "The sea is deep, blue and full of life."),
    ("What is 12 plus 30?", "12 plus 30 is 42."),
    ("Translate 'good morning' into Spanish.", "'Good morning' in Spanish is 'buenos días'."),
    ("Who wrote Romeo and Juliet?", "Romeo and Juliet was written by William Shakespeare."),
    ("Name three primary colours.", "Three primary colours are red, blue and yellow."),
    ("Why do we sleep?", "Sleep lets the body rest and the brain sort what it has learned."),
    ("What does a thermometer measure?", "A thermometer measures temperature."),
    ("Is water wet or dry?", "Water is wet."),
    ("Give me a tip for saving energy.", "Turn off lights and devices that nobody uses."),
    ("What gas do plants take in?", "Plants take in carbon dioxide and give off oxygen."),
)


def lessons() -> list[Lesson]:
    """The pairs as conversations."""
    return [
        Lesson(
            kind="chat",
            messages=({"role": "user", "content": question}, {"role": "assistant", "content": answer}),
        )
        for question, answer in PAIRS
    ]
