"""Addition and subtraction of whole numbers of one to four digits."""

from __future__ import annotations

import random

from trine.evaluation.items import Item, Split, draw, question

MAX_DIGITS = 4

ADDITION = (
    "What is {a} + {b}?",
    "{a} + {b} =",
    "{a}+{b}=",
    "Compute {a} + {b}.",
    "Add {a} and {b}.",
    "What is the sum of {a} and {b}?",
    "How much is {a} plus {b}?",
    "Calculate {a}+{b}.",
)

SUBTRACTION = (
    "What is {a} - {b}?",
    "{a} - {b} =",
    "{a}-{b}=",
    "Compute {a} - {b}.",
    "Subtract {b} from {a}.",
    "What is the difference of {a} and {b}?",
    "How much is {a} minus {b}?",
    "Calculate {a}-{b}.",
)


def _number(rng: random.Random) -> int:
    """A number whose count of digits is uniform, so that short numbers are as common as long ones."""
    digits = rng.randint(1, MAX_DIGITS)
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def addition(rng: random.Random, split: Split) -> Item:
    def propose() -> tuple[str, tuple[int, int]]:
        a, b = _number(rng), _number(rng)
        return f"{min(a, b)}+{max(a, b)}", (a, b)

    content, (a, b) = draw("addition", split, propose)
    return Item("addition", content, question(rng, ADDITION, a=a, b=b), str(a + b))


def subtraction(rng: random.Random, split: Split) -> Item:
    """One in five has a negative result."""

    def propose() -> tuple[str, tuple[int, int]]:
        a, b = _number(rng), _number(rng)
        if (a < b) == (rng.random() >= 0.2):
            a, b = b, a
        return f"{max(a, b)}-{min(a, b)}", (a, b)

    content, (a, b) = draw("subtraction", split, propose)
    return Item("subtraction", content, question(rng, SUBTRACTION, a=a, b=b), str(a - b))
