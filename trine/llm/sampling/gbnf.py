"""Grammars in GBNF (`root ::= …`), the notation of llama.cpp, translated to Lark, which llguidance reads.

GBNF has no lexer: a rule may begin or end in the middle of what another one would read as a word. llguidance has one,
which takes the longest match, and is fast because of it. So everything in the grammar that is regular is joined into
as few terminals as possible: a rule without recursion becomes one regular expression, and so does every run of
regular items within a recursive rule. What the longest match could still take too much of are terminals that follow
each other across recursive rules and share characters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from trine.core.errors import RequestError

_RULE = re.compile(r"^[ \t]*[A-Za-z_][\w-]*[ \t]*::=", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z_][\w-]*")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)+")
_REPEAT = re.compile(r"\{\s*(\d*)\s*(,?)\s*(\d*)\s*\}")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]", "'": "'", "-": "-", "^": "^"}
_HEX = {"x": 2, "u": 4, "U": 8}


@dataclass(frozen=True, slots=True)
class _Literal:
    text: str


@dataclass(frozen=True, slots=True)
class _Chars:
    """A character class as the inside of a regular expression's brackets; `.` is any character."""

    inside: str


@dataclass(frozen=True, slots=True)
class _Name:
    name: str
    position: int


@dataclass(frozen=True, slots=True)
class _Sequence:
    items: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Choice:
    items: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Repeat:
    item: _Node
    least: int
    most: int | None


_Node = _Literal | _Chars | _Name | _Sequence | _Choice | _Repeat


def is_gbnf(grammar: str) -> bool:
    """Whether the text defines rules with `::=`."""
    return _RULE.search(grammar) is not None


def gbnf_to_lark(grammar: str) -> str:
    """The grammar in Lark's notation. Raises RequestError with the line of what can't be read."""
    rules = _Parser(grammar).rules()
    start = next((name for name in ("root", "start") if name in rules), None)
    if start is None:
        raise RequestError("grammar: it needs a rule named root (or start)", param="guided_grammar")
    return _Writer(rules).write(start)


class _Parser:
    """Recursive descent over GBNF. A rule ends where the next one begins, or the text does."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def rules(self) -> dict[str, _Node]:
        rules: dict[str, _Node] = {}
        self._skip()
        while self._at < len(self._text):
            name = self._take_name()
            self._skip()
            self._expect("::=")
            if name in rules:
                raise self._error(f"rule {name} is defined twice")
            rules[name] = self._choice()
        for node in rules.values():
            for reference in _references(node):
                if reference.name not in rules:
                    self._at = reference.position
                    raise self._error(f"rule {reference.name} is not defined")
        return rules

    def _choice(self) -> _Node:
        branches = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            branches.append(self._sequence())
        return branches[0] if len(branches) == 1 else _Choice(tuple(branches))

    def _sequence(self) -> _Node:
        items: list[_Node] = []
        while True:
            self._skip()
            char = self._peek()
            if char in ("", "|", ")") or _RULE.match(self._text, self._at):
                return items[0] if len(items) == 1 else _Sequence(tuple(items))
            items.append(self._repeated(self._item(char)))

    def _item(self, char: str) -> _Node:
        if char == '"':
            return self._literal()
        if char == "[":
            return self._chars()
        if char == ".":
            self._at += 1
            return _Chars(".")
        if char == "(":
            self._at += 1
            inner = self._choice()
            self._expect(")")
            return inner
        position = self._at
        return _Name(self._take_name(), position)

    def _repeated(self, item: _Node) -> _Node:
        while True:
            char = self._peek()
            if char and char in "*+?":
                self._at += 1
                item = _Repeat(item, 1 if char == "+" else 0, 1 if char == "?" else None)
            elif char == "{":
                match = _REPEAT.match(self._text, self._at)
                if match is None or not (match[1] or match[3]):
                    raise self._error("a repetition is {m}, {m,}, {,n} or {m,n}")
                self._at = match.end()
                least = int(match[1] or 0)
                most = (int(match[3]) if match[3] else None) if match[2] else least
                if most is not None and most < least:
                    raise self._error(f"repetition {match[0]} ends before it begins")
                item = _Repeat(item, least, most)
            else:
                return item

    def _literal(self) -> _Node:
        self._at += 1
        text = ""
        while self._peek() != '"':
            text += self._char("a string")
        self._at += 1
        return _Literal(text)

    def _chars(self) -> _Node:
        self._at += 1
        inside = ""
        if self._peek() == "^":
            inside = "^"
            self._at += 1
        while self._peek() != "]":
            if self._peek() == "-" and inside not in ("", "^") and self._text[self._at + 1 : self._at + 2] != "]":
                inside += "-"
                self._at += 1
            else:
                inside += _class_char(self._char("a character class"))
        self._at += 1
        if inside == "":
            raise self._error("an empty character class matches nothing")
        return _Chars("." if inside == "^" else inside)

    def _char(self, where: str) -> str:
        """One character, escaped or not."""
        char = self._peek()
        if char == "" or char == "\n":
            raise self._error(f"{where} is not closed")
        self._at += 1
        if char != "\\":
            return char
        kind = self._peek()
        self._at += 1
        if kind in _HEX:
            digits = self._text[self._at : self._at + _HEX[kind]]
            if not re.fullmatch(r"[0-9A-Fa-f]+", digits) or len(digits) != _HEX[kind] or int(digits, 16) > 0x10FFFF:
                raise self._error(f"\\{kind} needs {_HEX[kind]} hexadecimal digits of a Unicode character")
            self._at += len(digits)
            return chr(int(digits, 16))
        if kind == "" or kind not in _ESCAPES:
            raise self._error(f"\\{kind} is no escape sequence")
        return _ESCAPES[kind]

    def _take_name(self) -> str:
        match = _NAME.match(self._text, self._at)
        if match is None:
            raise self._error(f"{self._peek()!r} is not expected here")
        self._at = match.end()
        return match[0]

    def _expect(self, text: str) -> None:
        if not self._text.startswith(text, self._at):
            raise self._error(f"{text!r} is expected here")
        self._at += len(text)

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _skip(self) -> None:
        match = _BLANK.match(self._text, self._at)
        if match is not None:
            self._at = match.end()

    def _error(self, message: str) -> RequestError:
        line = self._text.count("\n", 0, self._at) + 1
        return RequestError(f"grammar, line {line}: {message}", param="guided_grammar")


class _Writer:
    """Writes Lark: recursive rules as rules, everything regular as terminals."""

    def __init__(self, rules: dict[str, _Node]) -> None:
        self._rules = rules
        self._recursive = _recursive_rules(rules)
        self._numbers = {name: index for index, name in enumerate(rules)}
        self._terminals: dict[str, str] = {}

    def write(self, start: str) -> str:
        body = [f"start: {self._node(_Name(start, 0))}"]
        body += [f"rule_{self._numbers[name]}: {self._node(self._rules[name])}" for name in sorted(self._recursive)]
        terminals = [f"{name}: /{regex}/" for regex, name in self._terminals.items()]
        return "\n".join(["%llguidance {}", *body, *terminals]) + "\n"

    def _node(self, node: _Node) -> str:
        if self._is_regular(node):
            return self._terminal(node)
        if isinstance(node, _Name):
            return f"rule_{self._numbers[node.name]}"
        if isinstance(node, _Choice):
            regular = tuple(item for item in node.items if self._is_regular(item))
            others = [item for item in node.items if not self._is_regular(item)]
            branches = [self._terminal(_Choice(regular))] if regular else []
            return "(" + " | ".join(branches + [self._node(item) for item in others]) + ")"
        if isinstance(node, _Repeat):
            most = "" if node.most is None else node.most
            return f"({self._node(node.item)}){{{node.least},{most}}}"
        assert isinstance(node, _Sequence)
        return " ".join(self._runs(node.items))

    def _runs(self, items: tuple[_Node, ...]) -> list[str]:
        """A sequence's items, with neighbours that are regular joined."""
        parts: list[str] = []
        run: list[_Node] = []
        for item in items:
            if self._is_regular(item):
                run.append(item)
                continue
            if run:
                parts.append(self._terminal(_Sequence(tuple(run))))
                run = []
            parts.append(self._node(item))
        if run:
            parts.append(self._terminal(_Sequence(tuple(run))))
        return parts

    def _is_regular(self, node: _Node) -> bool:
        return all(reference.name not in self._recursive for reference in _references(node))

    def _terminal(self, node: _Node) -> str:
        regex = self._regex(node)
        if regex == "":
            return '""'
        return self._terminals.setdefault(regex, f"TERMINAL_{len(self._terminals)}")

    def _regex(self, node: _Node) -> str:
        if isinstance(node, _Literal):
            return "".join(_regex_char(char) for char in node.text)
        if isinstance(node, _Chars):
            return "(?s:.)" if node.inside == "." else f"[{node.inside}]"
        if isinstance(node, _Name):
            return f"(?:{self._regex(self._rules[node.name])})"
        if isinstance(node, _Choice):
            return "(?:" + "|".join(self._regex(item) for item in node.items) + ")"
        if isinstance(node, _Sequence):
            return "".join(self._regex(item) for item in node.items)
        most = "" if node.most is None else node.most
        return f"(?:{self._regex(node.item)}){{{node.least},{most}}}"


def _recursive_rules(rules: dict[str, _Node]) -> set[str]:
    """Rules that reach a cycle: those that are not regular as they stand."""
    uses = {name: {reference.name for reference in _references(node)} for name, node in rules.items()}
    regular: set[str] = set()
    while True:
        more = {name for name in rules if name not in regular and uses[name] <= regular}
        if not more:
            return set(rules) - regular
        regular |= more


def _references(node: _Node) -> list[_Name]:
    if isinstance(node, _Name):
        return [node]
    if isinstance(node, _Repeat):
        return _references(node.item)
    if isinstance(node, _Sequence | _Choice):
        return [reference for item in node.items for reference in _references(item)]
    return []


def _regex_char(char: str) -> str:
    return char if char.isalnum() or char in " _<>=!,:;%@'\"" else f"\\x{{{ord(char):x}}}"


def _class_char(char: str) -> str:
    return char if char.isalnum() or char == " " else f"\\x{{{ord(char):x}}}"
