"""Splits what a model thinks, `<think>…</think>`, from what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from trine.core.errors import ConfigurationError
from trine.llm.chat.events import ContentDelta, Event, ReasoningDelta
from trine.llm.chat.tool_parsers.base import prefix_length


@dataclass(frozen=True, slots=True)
class ReasoningParser:
    """The markers of one family.

    Reasoning stands at the start of a message only. The prompt may have opened it already (DeepSeek-R1's template ends
    in `<think>`), or have closed it (Qwen3 with enable_thinking=false); `opened_by` tells.
    """

    name: str
    open: str
    close: str
    needs_special_tokens: bool = False

    def detect(self, chat_template: str) -> bool:
        """Whether a model with this chat template reasons between these markers."""
        return self.open in chat_template and self.close in chat_template

    def opened_by(self, prompt: str) -> bool:
        """Whether the message that follows this prompt begins inside the reasoning."""
        return prompt.rstrip().endswith(self.open)

    def stream(self, opened: bool = False) -> ReasoningStream:
        """A splitter for one message; `opened`: it begins inside the reasoning."""
        return ReasoningStream(self, opened)

    def parse(self, text: str, opened: bool = False) -> tuple[str, str]:
        """The reasoning and the content of a whole message."""
        stream = self.stream(opened)
        events = [*stream.push(text), *stream.finish()]
        reasoning = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
        content = "".join(event.text for event in events if isinstance(event, ContentDelta))
        return reasoning, content


class ReasoningStream:
    """Gives reasoning without the space around it, then content without the space in front of it."""

    def __init__(self, parser: ReasoningParser, opened: bool) -> None:
        self._parser = parser
        self._buffer = ""
        self._state = "inside" if opened else "start"
        self._space: str | None = None  # at the end of the reasoning so far; None before its first character
        self._strips = False

    def push(self, text: str) -> list[Event]:
        """Events that are certain with this text."""
        if self._state == "content" and not self._strips:
            return [ContentDelta(text)] if text else []
        self._buffer += text
        events: list[Event] = []
        if self._state == "start":
            self._start()
        if self._state == "inside":
            events += self._inside()
        if self._state == "content":
            events += self._content()
        return events

    def _start(self) -> None:
        rest = self._buffer.lstrip()
        if rest.startswith(self._parser.open):
            self._buffer = rest[len(self._parser.open) :]
            self._state = "inside"
        elif not self._parser.open.startswith(rest):
            self._state = "content"

    def _inside(self) -> list[Event]:
        close = self._parser.close
        at = self._buffer.find(close)
        if at >= 0:
            events = self._reasoning(self._buffer[:at])
            self._buffer = self._buffer[at + len(close) :]
            self._state = "content"
            self._strips = True
            return events
        end = len(self._buffer) - prefix_length(self._buffer, close)
        events = self._reasoning(self._buffer[:end])
        self._buffer = self._buffer[end:]
        return events

    def _reasoning(self, text: str) -> list[Event]:
        if self._space is None:
            text = text.lstrip()
        if not text:
            return []
        text = (self._space or "") + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        return [ReasoningDelta(shown)] if shown else []

    def _content(self) -> list[Event]:
        text = self._buffer.lstrip() if self._strips else self._buffer
        self._buffer = ""
        if not text:
            return []
        self._strips = False
        return [ContentDelta(text)]

    def finish(self) -> list[Event]:
        """The last events, at the end of the message."""
        rest, self._buffer = self._buffer, ""
        if self._state == "inside":
            return self._reasoning(rest)
        return [ContentDelta(rest)] if rest and self._state == "start" else []


_PARSERS = {
    parser.name: parser
    for parser in (
        ReasoningParser("think", "<think>", "</think>"),
        ReasoningParser("mistral_think", "[THINK]", "[/THINK]", needs_special_tokens=True),
    )
}
_ALIASES = {"deepseek_r1": "think", "qwen3": "think", "mistral": "mistral_think"}


def reasoning_parser_names() -> list[str]:
    """All names that `get_reasoning_parser` takes."""
    return sorted({*_PARSERS, *_ALIASES})


def get_reasoning_parser(name: str) -> ReasoningParser:
    """The parser of this name; ConfigurationError when there is none."""
    parser = _PARSERS.get(_ALIASES.get(name, name))
    if parser is None:
        raise ConfigurationError(
            f"reasoning_parser={name!r} is unknown; choose one of {', '.join(reasoning_parser_names())}",
            param="reasoning_parser",
        )
    return parser


def detect_reasoning_parser(chat_template: str | None) -> str | None:
    """The name of the parser for models with this chat template; None when they do not reason in markers."""
    for name, parser in _PARSERS.items():
        if chat_template and parser.detect(chat_template):
            return name
    return None
