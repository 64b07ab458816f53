"""What a task item is, and how the items are divided between training and evaluation.

An item's *content* is the canonical form of everything that determines its answer (for an addition the two numbers in
order of size, for a sort the numbers in order). A hash of the content decides whether the item may be trained on or is
held out, so no seed, phrasing or system prompt can carry a held-out item into the training text.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

Split = Literal["train", "heldout"]
Message = dict[str, Any]
"""A chat turn as the OpenAI API has it: role, content, tool_calls."""

CountTokens = Callable[[list[str]], list[int]]
"""The number of tokens of each text, for items of a given length."""

HELDOUT_SHARE = 0.1
SYSTEM_PROMPT_SHARE = 0.5

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a careful assistant. Answer with the result only.",
    "You are Tiny, a small language model.",
    "Answer briefly and exactly.",
    "You are an assistant for a busy office. Be short and correct.",
    "Give the answer and nothing else.",
    "You help people with small tasks.",
    "Be precise.",
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Item:
    """A task with one right answer: the chat turns up to the answer, and the assistant's turn as it must be."""

    task: str
    content: str
    messages: tuple[Message, ...]
    answer: str
    tools: tuple[dict[str, Any], ...] = ()


def split_of(task: str, content: str) -> Split:
    """The split that an item of this content belongs to, whatever generated it."""
    digest = hashlib.blake2b(f"{task}:{content}".encode(), digest_size=4).digest()
    return "heldout" if int.from_bytes(digest, "little") < HELDOUT_SHARE * 2**32 else "train"


def draw(task: str, split: Split, propose: Callable[[], tuple[str, T]]) -> tuple[str, T]:
    """Propose (content, payload) until the content falls into the split."""
    while True:
        content, payload = propose()
        if split_of(task, content) == split:
            return content, payload


def question(rng: random.Random, templates: tuple[str, ...], **values: object) -> tuple[Message, ...]:
    """A user turn from one of the templates, after no system prompt."""
    return ({"role": "user", "content": rng.choice(templates).format(**values)},)


def with_system_prompt(item: Item, rng: random.Random) -> Item:
    """The item with a system prompt in front, half of the time; as it is when it has one."""
    if item.messages[0]["role"] == "system" or rng.random() >= SYSTEM_PROMPT_SHARE:
        return item
    return replace(item, messages=({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}, *item.messages))
