"""What parsers of chat output produce, piece by piece."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass

_LETTERS_AND_DIGITS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the message's text."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the text that a model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call of a tool begins. `index` counts the calls of the message from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Event = ContentDelta | ReasoningDelta | ToolCallStart | ToolCallArguments


@dataclass(slots=True)
class ToolCall:
    """A whole call; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


def random_call_id(prefix: str = "call_", length: int = 24) -> str:
    """An id such as clients know it: a prefix and random letters and digits."""
    return prefix + "".join(secrets.choice(_LETTERS_AND_DIGITS) for _ in range(length))
