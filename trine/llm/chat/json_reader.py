"""JSON read while it arrives: every character is checked as it comes, and the readers say at which one a value ends.

All readers take text by `feed(text, position) -> position`: they consume from `position` on, as far as the value or the
text goes. The result does not depend on how the text is cut.
"""

from __future__ import annotations

import json
import re
from enum import Enum

_SPACE = re.compile(r"[ \t\r\n]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_NUMBER_CHARS = re.compile(r"[0-9+\-.eE]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_LITERALS = {"t": "true", "f": "false", "n": "null"}
_HEX = frozenset("0123456789abcdefABCDEF")


class Status(Enum):
    """OPEN wants more text, DONE has read a whole value, FAILED has met a character that can't be there."""

    OPEN = 0
    DONE = 1
    FAILED = 2


class _Expect(Enum):
    VALUE = 0
    FIRST_VALUE = 1  # or the end of the array
    FIRST_KEY = 2  # or the end of the object
    KEY = 3
    COLON = 4
    COMMA = 5  # or the end of the container


class ValueReader:
    """Reads one JSON value. `take()` gives what was read since the last time.

    Control characters inside strings, which JSON forbids and models write (line breaks in code), come out escaped.
    """

    def __init__(self) -> None:
        self.status = Status.OPEN
        self._expect = _Expect.VALUE
        self._containers: list[str] = []  # "{" or "["
        self._string = False  # in a string; `_escape` holds what came of an escape sequence
        self._escape = ""
        self._scalar = ""  # a number or a literal so far
        self._output: list[str] = []

    def take(self) -> str:
        """Text read since the last call."""
        text = "".join(self._output)
        self._output.clear()
        return text

    def feed(self, text: str, position: int = 0) -> int:
        """Consumes from `text[position:]`; returns where it stopped: at the end, after the value, or at a bad
        character.
        """
        while position < len(text) and self.status is Status.OPEN:
            if self._string:
                position = self._in_string(text, position)
            elif self._scalar:
                position = self._in_scalar(text, position)
            else:
                end = _match_end(_SPACE, text, position)
                self._output.append(text[position:end])
                position = self._structure(text, end) if end < len(text) else end
        return position

    def _structure(self, text: str, position: int) -> int:
        char, expect = text[position], self._expect
        if char == '"' and expect is not _Expect.COLON and expect is not _Expect.COMMA:
            self._string = True
        elif expect in (_Expect.VALUE, _Expect.FIRST_VALUE) and char in "{[":
            self._containers.append(char)
            self._expect = _Expect.FIRST_KEY if char == "{" else _Expect.FIRST_VALUE
        elif expect in (_Expect.VALUE, _Expect.FIRST_VALUE) and (char in _LITERALS or char in "-0123456789"):
            self._scalar = char
        elif expect is _Expect.COLON and char == ":":
            self._expect = _Expect.VALUE
        elif expect is _Expect.COMMA and char == ",":
            self._expect = _Expect.KEY if self._containers[-1] == "{" else _Expect.VALUE
        elif self._closes(char):
            self._containers.pop()
            self._end_value()
        else:
            self.status = Status.FAILED
            return position
        self._output.append(char)
        return position + 1

    def _closes(self, char: str) -> bool:
        if char == "}":
            return self._expect is _Expect.FIRST_KEY or (self._expect is _Expect.COMMA and self._containers[-1] == "{")
        return char == "]" and (
            self._expect is _Expect.FIRST_VALUE or (self._expect is _Expect.COMMA and self._containers[-1] == "[")
        )

    def _end_value(self) -> None:
        if self._containers:
            self._expect = _Expect.COMMA
        else:
            self.status = Status.DONE

    def _in_string(self, text: str, position: int) -> int:
        if self._escape:
            return self._in_escape(text, position)
        end = _match_end(_PLAIN, text, position)
        self._output.append(text[position:end])
        if end == len(text):
            return end
        char = text[end]
        if char == "\\":
            self._escape = char
        elif char == '"':
            self._string = False
            self._output.append(char)
            if self._expect in (_Expect.KEY, _Expect.FIRST_KEY):
                self._expect = _Expect.COLON
            else:
                self._end_value()
        else:
            self._output.append(json.dumps(char)[1:-1])
        return end + 1

    def _in_escape(self, text: str, position: int) -> int:
        char = text[position]
        is_good = char in _HEX if self._escape.startswith("\\u") else char in '"\\/bfnrtu'
        if not is_good:
            self.status = Status.FAILED
            return position
        self._escape += char
        if len(self._escape) == (6 if self._escape.startswith("\\u") else 2):
            self._output.append(self._escape)
            self._escape = ""
        return position + 1

    def _in_scalar(self, text: str, position: int) -> int:
        word = _LITERALS.get(self._scalar[0])
        if word is not None:
            if text[position] != word[len(self._scalar)]:
                self.status = Status.FAILED
                return position
            self._scalar += text[position]
            self._output.append(text[position])
            if self._scalar == word:
                self._scalar = ""
                self._end_value()
            return position + 1
        end = _match_end(_NUMBER_CHARS, text, position)
        self._scalar += text[position:end]
        self._output.append(text[position:end])
        if end < len(text):  # only the next character tells that a number has ended
            if _NUMBER.fullmatch(self._scalar):
                self._end_value()
            else:
                self.status = Status.FAILED
            self._scalar = ""
        return end


class CallReader:
    """Reads one `{"name": …, "arguments": {…}}` (`parameters` will do too, in any order, among other keys).

    `name` is set, and `started` is true, as soon as it is certain that this is a call: the name is known and the
    arguments have begun. From then on `take()` gives the arguments' text as it comes. Arguments written as a string of
    JSON come at their end. FAILED before `started` means that the text is no call.
    """

    def __init__(self, arguments_required: bool = False) -> None:
        self.status = Status.OPEN
        self.name: str | None = None
        self._arguments_required = arguments_required
        self._expect = "{"
        self._key = ""
        self._value: ValueReader | None = None
        self._streams = False  # the arguments are an object, given on as they come
        self._has_arguments = False
        self._output: list[str] = []

    @property
    def started(self) -> bool:
        return self.name is not None and self._has_arguments

    def take(self) -> str:
        """Arguments' text since the last call; "" before `started`."""
        if not self.started:
            return ""
        text = "".join(self._output)
        self._output.clear()
        return text

    def feed(self, text: str, position: int = 0) -> int:
        """As ValueReader.feed."""
        while position < len(text) and self.status is Status.OPEN:
            if self._value is not None:
                position = self._in_value(self._value, text, position)
                continue
            position = _match_end(_SPACE, text, position)
            if position < len(text):
                position = self._structure(text, position)
        return position

    def _structure(self, text: str, position: int) -> int:
        char = text[position]
        if self._expect == "value":
            return self._begin_value(char, position)
        if char == '"' and self._expect in ("first key", "key"):
            self._expect = "in key"
            self._value = ValueReader()
            return position  # the reader takes the quote
        if char == "}" and self._expect in ("first key", ","):
            self._end()
            return position + (self.status is Status.DONE)
        following = {"{": "first key", ":": "value", ",": "key"}.get(char)
        if following is None or char != self._expect:
            self.status = Status.FAILED
            return position
        self._expect = following
        return position + 1

    def _begin_value(self, char: str, position: int) -> int:
        is_name = self._key == "name" and self.name is None
        is_arguments = self._key in ("arguments", "parameters") and not self._has_arguments
        if (is_name and char != '"') or (is_arguments and char not in '{"n'):
            self.status = Status.FAILED
            return position
        self._streams = is_arguments and char == "{"
        if self._streams:
            self._has_arguments = True
        self._key = "name" if is_name else "arguments" if is_arguments else ""
        self._value = ValueReader()
        return position

    def _in_value(self, value: ValueReader, text: str, position: int) -> int:
        position = value.feed(text, position)
        if self._streams:
            self._output.append(value.take())
        if value.status is Status.FAILED:
            self.status = Status.FAILED
        elif value.status is Status.DONE:
            self._value = None
            read, self._expect = self._expect, ","
            if read == "in key":
                self._key, self._expect = json.loads(value.take()), ":"
            elif not self._streams and self._key:
                self._end_named_value(json.loads(value.take()))
            self._streams = False
        return position

    def _end_named_value(self, read: object) -> None:
        if self._key == "name":
            name = str(read)
            if name.isprintable() and name:  # lone surrogates are not
                self.name = name
            else:
                self.status = Status.FAILED
            return
        self._has_arguments = True
        if read is None:
            self._output.append("{}")
        elif is_json_object(str(read)):
            self._output.append(str(read))
        else:
            self.status = Status.FAILED
            self._has_arguments = False

    def _end(self) -> None:
        if self.name is not None and not self._has_arguments and not self._arguments_required:
            self._has_arguments = True
            self._output.append("{}")
        self.status = Status.DONE if self.started else Status.FAILED


class ArgumentsReader:
    """Reads a call's arguments alone, an object, when the name is known from before it."""

    def __init__(self, name: str) -> None:
        self.name: str | None = name
        self.started = False
        self._value = ValueReader()

    @property
    def status(self) -> Status:
        return self._value.status

    def take(self) -> str:
        """Text read since the last call."""
        return self._value.take()

    def feed(self, text: str, position: int = 0) -> int:
        """As ValueReader.feed; the text must begin with the object's brace."""
        self.started = True
        return self._value.feed(text, position)


def is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _match_end(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return position if match is None else match.end()
