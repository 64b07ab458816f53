"""A chat message out of a model's text: reasoning, content and calls of tools, while it is generated or at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trine.llm.chat.events import ContentDelta, Event, ReasoningDelta, ToolCall
from trine.llm.chat.reasoning_parsers import ReasoningParser
from trine.llm.chat.tool_parsers.base import ToolParser, collect


class MessageStream:
    """Reasoning is split off first; calls are looked for in the rest. Either parser may be None.

    prompt: the text that the message follows; it may have opened the reasoning.
    """

    def __init__(
        self, tool_parser: ToolParser | None, reasoning_parser: ReasoningParser | None, prompt: str = ""
    ) -> None:
        self._tools = None if tool_parser is None else tool_parser.stream()
        self._reasoning = None
        if reasoning_parser is not None:
            self._reasoning = reasoning_parser.stream(opened=reasoning_parser.opened_by(prompt))

    def push(self, text: str) -> list[Event]:
        """Events that are certain with this text."""
        if self._reasoning is None:
            return self._parse(text)
        return self._route(self._reasoning.push(text))

    def finish(self) -> list[Event]:
        """The last events, at the end of the message."""
        events = [] if self._reasoning is None else self._route(self._reasoning.finish())
        return events if self._tools is None else [*events, *self._tools.finish()]

    def _route(self, events: Sequence[Event]) -> list[Event]:
        routed: list[Event] = []
        for event in events:
            if isinstance(event, ContentDelta):
                routed += self._parse(event.text)
            else:
                routed.append(event)
        return routed

    def _parse(self, text: str) -> list[Event]:
        if self._tools is not None:
            return self._tools.push(text)
        return [ContentDelta(text)] if text else []


@dataclass(slots=True)
class Message:
    """A whole message."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)


def parse_message(
    text: str, tool_parser: ToolParser | None, reasoning_parser: ReasoningParser | None, prompt: str = ""
) -> Message:
    """The message of a whole text: what its stream gives, put together."""
    stream = MessageStream(tool_parser, reasoning_parser, prompt)
    events = [*stream.push(text), *stream.finish()]
    content, calls = collect(events)
    reasoning = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
    return Message(content, reasoning, calls)
