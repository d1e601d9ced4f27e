"""A spread of prompts that no lesson is about: what the model answers to them is what it shall not forget.

They are few and plain on purpose. The model's own distributions at every token of its answers are kept
(`recall.py`), so a hundred of them say much more than a hundred right answers would.
"""

from __future__ import annotations

from itertools import chain, zip_longest

from lichen.adapters.lesson_forms import Lesson

TOPICS = (
    "lighthouses", "paper", "the tides", "bicycles", "salt", "maps", "honey bees", "clocks", "bridges", "tea",
    "volcanoes", "libraries", "owls", "windmills", "the violin", "rivers", "chess", "the printing press",
)  # fmt: skip
ABOUT = (
    "What is the most important thing to know about {}?",
    "Explain to a child how {} came to be.",
    "Write the first lines of a story about {}.",
    "List three facts about {}.",
)
OTHERS = (
    "Hello! How are you today?",
    "Who are you, and what can you do?",
    "What is the capital of France?",
    "Who wrote Romeo and Juliet?",
    "Why do we sleep?",
    "Is water wet or dry?",
    "Name three primary colours.",
    "What is 12 plus 30?",
    "A train goes 60 miles in one hour. How far does it go in three and a half hours?",
    "Tom has 15 apples, gives away 6 and buys 4. How many does he have now?",
    "If all cats are animals and Mia is a cat, what is Mia?",
    "Translate into Spanish: Good morning, my friend.",
    "Translate from German: Der Zug kommt heute zu spät.",
    "Write a Python function that tells whether a number is prime.",
    "What does this print: for i in range(3): print(i * i)",
    "Write an SQL query for the names of all customers from Norway.",
    "Correct the mistakes: She go to school every days.",
    "Is this review positive or negative? The soup was cold and nobody cared.",
    "Which word does not belong: apple, pear, hammer, plum?",
    "Give the opposite of each word: hot, early, generous.",
    "Summarize in one sentence: The town built a bridge in 1890. A flood took it in 1912, and since then "
    "people cross the river by ferry. Last year the council decided to build a new one.",
    "Find the names and dates: On 4 May 1961 Ada Brown met Luis Ortega in Lisbon, and they married in 1963.",
    "Answer from the text alone. Text: The museum opens at ten and closes at five, on Sundays at three. "
    "Question: When does it close on Sundays?",
    "Turn this into JSON: Anna is 31 years old and lives in Oslo.",
    "Write a short and polite letter that asks for a refund.",
    "Give me a tip for saving energy at home.",
    "Plan a weekend in Rome for two people.",
    "I feel sad today. What should I do?",
    "Rewrite more formally: hey, can you send me that file asap?",
    "Continue: Once upon a time, in a small village by the sea,",
    "What are the advantages and disadvantages of working at night?",
    "Pretend to be a pirate and tell me about your ship.",
)


def prompts() -> list[str]:
    """All of them, kinds mixed, so that any part of the list is a spread too."""
    rounds = range(len(ABOUT))
    about = [
        ABOUT[(turn + number) % len(ABOUT)].format(topic)
        for turn in rounds
        for number, topic in enumerate(TOPICS)
    ]
    mixed = zip_longest(OTHERS, about[0::2], about[1::2])
    return [prompt for prompt in chain.from_iterable(mixed) if prompt is not None]


def questions() -> list[Lesson]:
    """The prompts as conversations whose answers nobody reads."""
    return [
        Lesson(
            kind="chat",
            messages=({"role": "user", "content": prompt}, {"role": "assistant", "content": "."}),
        )
        for prompt in prompts()
    ]
