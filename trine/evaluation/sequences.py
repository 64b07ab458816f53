"""Tasks on short sequences: sorting, reversing, counting, copying, and stopping after the right number of words."""

from __future__ import annotations

import random
import string

from trine.evaluation.items import Item, Split, draw, question
from trine.evaluation.words import ADJECTIVES, CITIES, FIRST_NAMES, LAST_NAMES, NOUNS

SORT_UP = (
    "Sort these numbers: {items}",
    "Sort in ascending order: {items}",
    "Put these numbers in order from smallest to largest: {items}",
    "Order these numbers from low to high: {items}.",
)
SORT_DOWN = (
    "Sort in descending order: {items}",
    "Put these numbers in order from largest to smallest: {items}",
    "Order these numbers from high to low: {items}.",
)
REVERSE = (
    "Reverse this list: {items}",
    "Reverse the order of: {items}",
    "Write this backwards, item by item: {items}",
    "Give these items in reverse order: {items}",
)
COUNT_ONE = (
    'How many times does "{target}" appear in this list? {items}',
    'Count the "{target}" in: {items}',
    "How often does {target} occur in the following list? {items}",
)
COUNT_ALL = ("How many items are in this list? {items}", "Count the items: {items}", "How long is this list? {items}")
COPY = (
    "Repeat exactly: {text}",
    "Copy this text: {text}",
    "Say this back to me: {text}",
    "Repeat the following text.\n{text}",
    "Echo: {text}",
)
REPEAT = (
    'Write the word "{word}" {count} times.',
    "Say {word} {count} times.",
    'Repeat "{word}" {count} times and stop.',
)
RANGE = (
    "Count from {first} to {last}.",
    "Write the numbers from {first} to {last}.",
    "List all whole numbers from {first} to {last}, then stop.",
)
FIRST_WORDS = (
    "Write the first {count} words of this list and stop: {items}",
    "Give only the first {count} of these words: {items}",
)


def sorting(rng: random.Random, split: Split) -> Item:
    """Three to eight distinct numbers of one to three digits, up or down."""

    def propose() -> tuple[str, list[int]]:
        high = 10 ** rng.randint(1, 3) - 1
        numbers = rng.sample(range(high + 1), rng.randint(3, 8))
        return " ".join(map(str, sorted(numbers))), numbers

    content, numbers = draw("sorting", split, propose)
    separator = rng.choice((", ", " "))
    down = rng.random() < 0.4
    messages = question(rng, SORT_DOWN if down else SORT_UP, items=separator.join(map(str, numbers)))
    return Item("sorting", content, messages, separator.join(map(str, sorted(numbers, reverse=down))))


def reversing(rng: random.Random, split: Split) -> Item:
    """Three to ten words, letters or digits, separated."""

    def propose() -> tuple[str, list[str]]:
        pool = rng.choice((NOUNS, NOUNS, string.ascii_lowercase, string.digits))
        items = [rng.choice(pool) for _ in range(rng.randint(3, 10))]
        return min(" ".join(items), " ".join(reversed(items))), items

    content, items = draw("reversing", split, propose)
    separator = rng.choice((", ", " ", "-"))
    messages = question(rng, REVERSE, items=separator.join(items))
    return Item("reversing", content, messages, separator.join(reversed(items)))


def counting(rng: random.Random, split: Split) -> Item:
    """Occurrences of one item in a list of up to 16 (three in four), or the length of a list of up to 12."""

    def propose() -> tuple[str, tuple[list[str], str | None]]:
        pool = rng.choice((NOUNS, string.ascii_lowercase, string.digits))
        if rng.random() < 0.25:
            items = [rng.choice(pool) for _ in range(rng.randint(2, 12))]
            return "length " + " ".join(sorted(items)), (items, None)
        kinds = rng.sample(pool, rng.randint(2, 5))
        length = rng.randint(4, 16)
        count = rng.randint(0, min(8, length))
        items = [kinds[0]] * count + [rng.choice(kinds[1:]) for _ in range(length - count)]
        rng.shuffle(items)
        return f"{kinds[0]} in " + " ".join(sorted(items)), (items, kinds[0])

    content, (items, target) = draw("counting", split, propose)
    listed = rng.choice((", ", " ")).join(items)
    if target is None:
        return Item("counting", content, question(rng, COUNT_ALL, items=listed), str(len(items)))
    return Item("counting", content, question(rng, COUNT_ONE, items=listed, target=target), str(items.count(target)))


def _word(rng: random.Random) -> str:
    return rng.choice(rng.choice((NOUNS, NOUNS, ADJECTIVES, CITIES, FIRST_NAMES, LAST_NAMES)))


def _code(rng: random.Random) -> str:
    alphabet = rng.choice((string.digits, string.ascii_uppercase + string.digits, string.ascii_letters + string.digits))
    return "".join(rng.choices(alphabet, k=rng.randint(3, 12)))


def _copy_text(rng: random.Random) -> str:
    kind = rng.randrange(3)
    if kind == 0:
        return " ".join(_word(rng) for _ in range(rng.randint(2, 25)))
    if kind == 1:
        return rng.choice((" ", "-", ", ")).join(_code(rng) for _ in range(rng.randint(1, 4)))
    parts = [
        rng.choice((_word, _code))(rng) + rng.choice(("", "", "", ",", ";", ":")) for _ in range(rng.randint(3, 16))
    ]
    return " ".join(parts).rstrip(",;:") + rng.choice((".", "!", "?"))


def copying(rng: random.Random, split: Split) -> Item:
    """Up to 25 words, or codes of letters and digits, or a mixture with punctuation."""

    def propose() -> tuple[str, str]:
        text = _copy_text(rng)
        return text, text

    content, text = draw("copying", split, propose)
    return Item("copying", content, question(rng, COPY, text=text), text)


def stopping(rng: random.Random, split: Split) -> Item:
    """Text that could go on: the turn must end after the given number of words or at the given number."""

    def propose() -> tuple[str, tuple[tuple[str, ...], dict[str, object], str]]:
        kind = rng.randrange(3)
        if kind == 0:
            word, count = rng.choice(NOUNS), rng.randint(1, 10)
            return f"{word} x {count}", (REPEAT, {"word": word, "count": count}, " ".join([word] * count))
        if kind == 1:
            first = rng.randint(0, 10 ** rng.randint(1, 3) - 1)
            last = first + rng.randint(1, 12)
            answer = " ".join(map(str, range(first, last + 1)))
            return f"{first}..{last}", (RANGE, {"first": first, "last": last}, answer)
        items = [rng.choice(NOUNS) for _ in range(rng.randint(3, 10))]
        count = rng.randint(1, len(items) - 1)
        answer = ", ".join(items[:count])
        return f"{count} of {answer}", (FIRST_WORDS, {"count": count, "items": ", ".join(items)}, answer)

    content, (templates, values, answer) = draw("stopping", split, propose)
    return Item("stopping", content, question(rng, templates, **values), answer)
