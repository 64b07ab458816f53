"""What a tool parser is, and the machine behind those whose calls are JSON."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from trine.llm.chat.events import ContentDelta, Event, ToolCall, ToolCallArguments, ToolCallStart
from trine.llm.chat.json_reader import ArgumentsReader, CallReader, Status
from trine.llm.sampling.params import GuidedParams

if TYPE_CHECKING:
    from trine.llm.tokenizer import Tokenizer

Tool = dict[str, Any]
"""A tool as OpenAI's clients send it: {"type": "function", "function": {"name", "description", "parameters"}}."""


class ToolStream(Protocol):
    """Parses one message while it is generated."""

    def push(self, text: str) -> list[Event]:
        """Events that are certain with this text."""

    def finish(self) -> list[Event]:
        """The last events, at the end of the message."""


class ToolParser(Protocol):
    """How one family of models writes calls of tools. `name` is what `--tool-call-parser` takes.

    needs_special_tokens: the markers are special tokens, so that the text must be made with skip_special_tokens=False.
    """

    name: str
    needs_special_tokens: bool

    def detect(self, chat_template: str) -> bool:
        """Whether a model with this chat template writes calls this way."""

    def stream(self) -> ToolStream:
        """A parser for one message."""

    def forced_calls(
        self, tools: Sequence[Tool], choice: str | None, parallel: bool, tokenizer: Tokenizer | None = None
    ) -> GuidedParams:
        """A grammar of which every text is one call, or with `parallel` one or more, of these tools.

        choice: the name of the one tool to call, once; None for any. Arguments follow the tool's JSON schema.
        tokenizer: tells which markers are tokens, which then are forced as such; always give it when there is one.
        """


def parse(parser: ToolParser, text: str) -> tuple[str, list[ToolCall]]:
    """The content and the calls of a whole message: what its stream gives, put together."""
    stream = parser.stream()
    return collect([*stream.push(text), *stream.finish()])


def collect(events: Sequence[Event]) -> tuple[str, list[ToolCall]]:
    """Content and calls out of events."""
    content: list[str] = []
    calls: list[ToolCall] = []
    for event in events:
        if isinstance(event, ContentDelta):
            content.append(event.text)
        elif isinstance(event, ToolCallStart):
            calls.append(ToolCall(event.id, event.name, ""))
        elif isinstance(event, ToolCallArguments):
            calls[event.index].arguments += event.text
    return "".join(content), calls


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """Where calls stand in a message.

    open: the marker before a call or a list of them. close: the marker after it, "" for none. bracketed: calls stand in
    a JSON list. bare: an object at the very start of the message is a call too, without the marker. separators:
    characters that may stand between calls. named: `name{arguments}` after the marker is a call. arguments_required: an
    object without arguments is no call.
    """

    open: str
    close: str = ""
    bracketed: bool = False
    bare: bool = False
    separators: str = ""
    named: bool = False
    arguments_required: bool = False


_NAMED = re.compile(r"([A-Za-z0-9_.\-]{1,128})(?:\[CALL_ID\][A-Za-z0-9]*)?(?:\[ARGS\])?[ ]?(?=\{)")
_NAMED_PREFIX = re.compile(r"[A-Za-z0-9_.\-]{1,128}(?:\[[A-Z_]{0,8}\]?[A-Za-z0-9]*){0,2} ?")


class JsonCallStream:
    """The machine: text, then calls, then text again.

    A call begins for the reader of the events when its name is read and its arguments have begun; from there on
    arguments are given on as they come. What turns out before that not to be a call stays content, to the letter. Where
    JSON breaks later, the call keeps the arguments up to there, and the rest is content. Space around calls is dropped.
    The result does not depend on how the text is cut.
    """

    def __init__(self, syntax: CallSyntax, new_id: Callable[[], str]) -> None:
        self._syntax = syntax
        self._new_id = new_id
        self._buffer = ""  # text that is not consumed
        self._step = self._start if syntax.bare else self._text
        self._space = ""  # at the end of the content: given out unless a call follows
        self._after_call = False  # drops space at the start of content
        self._raw = ""  # text consumed for a call that has not begun yet, and may turn out to be content
        self._marker = 0  # how many characters of it are not to be looked at again in that case
        self._in_list = False
        self._reader: CallReader | ArgumentsReader | None = None
        self._index = -1
        self._events: list[Event] = []

    def push(self, text: str) -> list[Event]:
        """See ToolStream."""
        self._buffer += text
        while self._step():
            pass
        return self._take()

    def finish(self) -> list[Event]:
        """See ToolStream."""
        while self._raw:
            self._give_up()
            while self._step():
                pass
        ignored = " \t\r\n" + self._syntax.separators if self._step == self._after else ""
        if self._buffer.strip(ignored) or not ignored:
            self._content(self._buffer)
        self._buffer = ""
        if self._space and not self._after_call:
            self._events.append(ContentDelta(self._space))
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # The steps: each consumes some of the buffer, and returns whether another one may follow on what is left.

    def _start(self) -> bool:
        """At the start of a message, where an object may be a call."""
        space, rest = _split_space(self._buffer)
        if not rest:
            return False
        self._step = self._text
        if rest[0] == "{":
            self._content(space)
            self._buffer = rest
            self._expect_call(raw="", marker=1)
        return True

    def _text(self) -> bool:
        marker = self._syntax.open
        at = self._buffer.find(marker)
        if at < 0:
            at = len(self._buffer) - prefix_length(self._buffer, marker)
            self._content(self._buffer[:at])
            self._buffer = self._buffer[at:]
            return False
        self._content(self._buffer[:at])
        self._buffer = self._buffer[at + len(marker) :]
        self._raw, self._marker = marker, len(marker)
        self._step = self._opened
        return True

    def _opened(self) -> bool:
        """After the marker: a list, a call, or a name."""
        space, rest = _split_space(self._buffer)
        if not rest:
            return False
        self._in_list = self._syntax.bracketed and rest[0] == "["
        if self._in_list:
            self._buffer = rest[1:]
            self._raw += space + "["
            self._step = self._listed
        elif rest[0] == "{":
            self._buffer = rest
            self._expect_call(self._raw + space, self._marker)
        elif self._syntax.named and (match := _NAMED.match(rest)):
            self._buffer = rest[match.end() :]
            self._expect_call(self._raw + space + match[0], self._marker)
            self._reader = ArgumentsReader(match[1])
        elif self._syntax.named and _NAMED_PREFIX.fullmatch(rest):
            return False
        else:
            self._give_up()
        return True

    def _listed(self) -> bool:
        """After a list's bracket: the first call."""
        space, rest = _split_space(self._buffer)
        if not rest:
            return False
        if rest[0] == "{":
            self._buffer = rest
            self._expect_call(self._raw + space, self._marker)
        else:
            self._give_up()
        return True

    def _expect_call(self, raw: str, marker: int) -> None:
        self._raw, self._marker = raw, marker
        self._reader = CallReader(self._syntax.arguments_required)
        self._step = self._undecided

    def _undecided(self) -> bool:
        """In what may be a call."""
        reader = self._reader
        if not self._buffer or reader is None:
            return False
        end = reader.feed(self._buffer)
        self._raw += self._buffer[:end]
        self._buffer = self._buffer[end:]
        if reader.started:
            self._index += 1
            self._events.append(ToolCallStart(self._index, self._new_id(), reader.name or ""))
            self._raw = self._space = ""
            self._after_call = True
            self._step = self._arguments
            return True
        if reader.status is Status.OPEN:
            return False
        self._give_up()
        return True

    def _arguments(self) -> bool:
        """In a call that has begun."""
        reader = self._reader
        if reader is None:
            return False
        end = reader.feed(self._buffer)
        self._buffer = self._buffer[end:]
        if text := reader.take():
            self._events.append(ToolCallArguments(self._index, text))
        if reader.status is Status.OPEN:
            return False
        self._reader = None
        self._step = self._after if reader.status is Status.DONE else self._text
        return True

    def _after(self) -> bool:
        """After a call: another one, the closing marker, or text."""
        rest = self._buffer.lstrip(" \t\r\n" + self._syntax.separators)
        close = "]" if self._in_list else self._syntax.close
        if not rest or (len(rest) < len(close) and close.startswith(rest)):
            return False
        if rest[0] == "{":
            self._buffer = rest
            self._expect_call(raw="", marker=1)
            return True
        if close and rest.startswith(close):
            self._buffer = rest[len(close) :]
        self._step = self._text
        return True

    def _give_up(self) -> None:
        """What was taken for a call is content: its marker for certain, the rest is looked at again."""
        text, self._raw, self._reader = self._raw + self._buffer, "", None
        self._content(text[: self._marker])
        self._buffer = text[self._marker :]
        self._step = self._text

    def _content(self, text: str) -> None:
        if self._after_call:
            text = text.lstrip()
        if not text:
            return
        self._after_call = False
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._events.append(ContentDelta(shown))


def _split_space(text: str) -> tuple[str, str]:
    rest = text.lstrip()
    return text[: len(text) - len(rest)], rest


def prefix_length(text: str, marker: str) -> int:
    """Length of the longest end of `text` that `marker` begins with, but is not all of."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0
