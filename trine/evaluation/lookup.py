"""Looking up the value of a key in a list of key–value pairs, up to 3,500 tokens long.

The pair that is asked for decides the split: no pair of a training list is ever held out, so a held-out answer is a
pair that training never saw.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

from trine.evaluation.items import CountTokens, Item, Message, Split, split_of
from trine.evaluation.words import ADJECTIVES, CITIES, FIRST_NAMES, LAST_NAMES, NOUNS

SHORTEST = 60
LONGEST = 3500

INTRODUCTIONS = (
    "Here is a list of keys and values.\n{lines}\n\n{ask}",
    "{lines}\n\n{ask}",
    "Use this table:\n{lines}\n\n{ask}",
    "Remember these entries:\n{lines}\n\n{ask}",
)
SYSTEM_INTRODUCTIONS = ("Answer from this list.\n{lines}", "You know these entries:\n{lines}", "{lines}")
QUESTIONS = (
    "What is the value of {key}?",
    "Look up {key}.",
    "What does the list say for {key}?",
    "Give me the value of {key}.",
    "{key}?",
)
LINE_FORMS = ("{key}: {value}", "{key} = {value}", "- {key}: {value}", "{key} -> {value}")
SHORTEST_LINE = 4
"""No line has fewer tokens: so many lines are drawn that they fill the budget."""


@dataclass(frozen=True, slots=True)
class Table:
    """Pairs, and the text of the list that shows them."""

    pairs: list[tuple[str, str]]
    lines: str


def _keys(rng: random.Random, count: int) -> list[str]:
    """Distinct keys of one kind: two words, a name, a word with a number, or a code."""
    kind = rng.randrange(4)
    keys: dict[str, None] = {}
    while len(keys) < count:
        if kind == 0:
            key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
        elif kind == 1:
            key = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
        elif kind == 2:
            key = f"{rng.choice(NOUNS)}{rng.randrange(100)}"
        else:
            key = "".join(rng.choices(string.ascii_uppercase, k=2)) + str(rng.randrange(10, 100))
        keys[key] = None
    return list(keys)


def _value(rng: random.Random, kind: int) -> str:
    if kind == 0:
        return str(rng.randrange(10, 100000))
    if kind == 1:
        return rng.choice(NOUNS)
    return f"{rng.choice(ADJECTIVES)} {rng.choice(CITIES)}"


def make_table(rng: random.Random, split: Split, budget: int, count_tokens: CountTokens) -> Table:
    """A list of as many lines as fit into `budget` tokens (at least two).

    A training list holds training pairs only; a held-out list holds pairs of both splits.
    """
    form, kind = rng.choice(LINE_FORMS), rng.choice((0, 0, 1, 2))
    keys = _keys(rng, max(8, budget // SHORTEST_LINE))
    pairs = [(key, _value(rng, kind)) for key in keys]
    if split == "train":
        pairs = [(key, value) for key, value in pairs if split_of("lookup", f"{key}={value}") == "train"]
    lines = [form.format(key=key, value=value) for key, value in pairs]
    total = taken = 0
    for tokens in count_tokens([line + "\n" for line in lines]):
        total += tokens
        if taken >= 2 and total > budget:
            break
        taken += 1
    return Table(pairs[:taken], "\n".join(lines[:taken]))


def first_turn(rng: random.Random, table: Table, key: str) -> tuple[Message, ...]:
    """The list in the system prompt or in front of the question, and the question for one key."""
    ask = rng.choice(QUESTIONS).format(key=key)
    if rng.random() < 0.3:
        system = rng.choice(SYSTEM_INTRODUCTIONS).format(lines=table.lines)
        return ({"role": "system", "content": system}, {"role": "user", "content": ask})
    return ({"role": "user", "content": rng.choice(INTRODUCTIONS).format(lines=table.lines, ask=ask)},)


def lookup_of_length(rng: random.Random, split: Split, budget: int, count_tokens: CountTokens, task: str) -> Item:
    """A lookup in a list of `budget` tokens; the pair that is asked for belongs to the split."""
    while True:
        table = make_table(rng, split, budget, count_tokens)
        candidates = [pair for pair in table.pairs if split_of("lookup", f"{pair[0]}={pair[1]}") == split]
        if candidates:
            key, value = rng.choice(candidates)
            return Item(task, f"{key}={value}", first_turn(rng, table, key), value)


def lookup(rng: random.Random, split: Split, count_tokens: CountTokens) -> Item:
    """A list of 60 to 3,500 tokens, the logarithm of its length uniform."""
    budget = round(SHORTEST * (LONGEST / SHORTEST) ** rng.random())
    return lookup_of_length(rng, split, budget, count_tokens, "lookup")


def lookup_3500(rng: random.Random, split: Split, count_tokens: CountTokens) -> Item:
    """A list of 3,500 tokens (the last line that fits)."""
    return lookup_of_length(rng, split, LONGEST, count_tokens, "lookup_3500")
