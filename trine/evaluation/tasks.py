"""The tasks with one right answer that the embedded model is trained on and scored by."""

from __future__ import annotations

import random
from collections.abc import Callable

from trine.evaluation.arithmetic import addition, subtraction
from trine.evaluation.extraction import extraction
from trine.evaluation.items import CountTokens, Item, Split, with_system_prompt
from trine.evaluation.lookup import lookup, lookup_3500
from trine.evaluation.sequences import copying, counting, reversing, sorting, stopping
from trine.evaluation.tools import tool_calling

SHORT_TASKS: dict[str, Callable[[random.Random, Split], Item]] = {
    "addition": addition,
    "subtraction": subtraction,
    "sorting": sorting,
    "reversing": reversing,
    "counting": counting,
    "copying": copying,
    "extraction": extraction,
    "tool_calling": tool_calling,
    "stopping": stopping,
}

LENGTH_TASKS: dict[str, Callable[[random.Random, Split, CountTokens], Item]] = {
    "lookup": lookup,
    "lookup_3500": lookup_3500,
}
"""Tasks whose items are of a length in tokens."""

TASKS = (*SHORT_TASKS, *LENGTH_TASKS)


def make_item(task: str, rng: random.Random, split: Split, count_tokens: CountTokens) -> Item:
    """One item of the task; the same random state gives the same item."""
    item = SHORT_TASKS[task](rng, split) if task in SHORT_TASKS else LENGTH_TASKS[task](rng, split, count_tokens)
    return with_system_prompt(item, rng)


def make_items(task: str, seed: int, count: int, split: Split, count_tokens: CountTokens) -> list[Item]:
    """`count` items of the task; items of one seed are the first ones of a longer list of the same seed."""
    rng = random.Random(f"{task}/{split}/{seed}")
    return [make_item(task, rng, split, count_tokens) for _ in range(count)]
