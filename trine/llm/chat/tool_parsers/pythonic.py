"""Calls as Python: `[get_weather(city="Paris"), now()]`, as Llama 3.2 and 4 write them.

The whole message is such a list or it is content; so a message that begins like one is held until its end.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trine.core.errors import RequestError
from trine.llm.chat.events import ContentDelta, Event, ToolCallArguments, ToolCallStart, random_call_id
from trine.llm.chat.tool_parsers.base import Tool, ToolStream
from trine.llm.chat.tool_parsers.grammar import arguments_schema, functions_to_call, literal
from trine.llm.sampling.params import GuidedParams

if TYPE_CHECKING:
    from trine.llm.tokenizer import Tokenizer

_BEGINS = re.compile(r"\s*(?:<\|python_start\|>)?\s*\[\s*[A-Za-z_][A-Za-z0-9_.]*\(")
_MAY_BEGIN = re.compile(r"\s*(?:<(?:\|[a-z_]*(?:\|>?)?)?)?\s*(?:\[\s*(?:[A-Za-z_][A-Za-z0-9_.]*)?)?")
_WRAPPING = re.compile(r"\s*(?:<\|python_start\|>)?(.*?)(?:<\|python_end\|>)?\s*", re.DOTALL)
_NAMES = {"true": True, "false": False, "null": None}


class PythonicParser:
    """See the module."""

    name = "pythonic"
    needs_special_tokens = False

    def detect(self, chat_template: str) -> bool:
        """By the instruction in the system prompt."""
        return re.search(r"\[func_name1\(|python_start\|>", chat_template) is not None

    def stream(self) -> ToolStream:
        """See ToolParser."""
        return _PythonicStream()

    def forced_calls(
        self, tools: Sequence[Tool], choice: str | None, parallel: bool, tokenizer: Tokenizer | None = None
    ) -> GuidedParams:
        """See ToolParser. Arguments come in the schema's order, the required ones first."""
        functions = functions_to_call(tools, choice)
        more = '(", " call)*' if parallel and choice is None else ""
        rules = [f'start: "[" call {more} "]"']
        rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(functions))))
        for index, function in enumerate(functions):
            rules += _call_rules(index, function)
        return GuidedParams(grammar="\n".join(rules) + "\n")


def _call_rules(index: int, function: Mapping[str, Any]) -> list[str]:
    name = function["name"]
    schema = arguments_schema(function)
    properties = schema.get("properties", {})
    for word in (*name.split("."), *properties):
        if not word.isidentifier():
            raise RequestError(
                f"tools: {word!r} in {name!r} is no Python name, which this model's calls need", param="tools"
            )
    required = [key for key in properties if key in schema.get("required", ())]
    optional = [key for key in properties if key not in required]
    value = {key: f"{literal(key + '=')} value_{index}_{place}" for place, key in enumerate(properties)}
    shared = {key: schema[key] for key in ("$defs", "definitions", "x-guidance") if key in schema}
    rules = [
        f"value_{index}_{place}: %json {json.dumps({**shared, **_as_schema(part)})}"
        for place, part in enumerate(properties.values())
    ]
    if required:
        body = ' ", " '.join(value[key] for key in required)
        body += "".join(f' (", " {value[key]})?' for key in optional)
    else:  # any subset: a choice of which one comes first
        starts = [
            " ".join([value[key], *(f'(", " {value[later]})?' for later in optional[place + 1 :])])
            for place, key in enumerate(optional)
        ]
        body = f"({' | '.join(starts)})?" if starts else ""
    return [f'call_{index}: {literal(name + "(")} {body} ")"', *rules]


def _as_schema(part: Any) -> dict[str, Any]:
    return dict(part) if isinstance(part, Mapping) else {}


class _PythonicStream:
    """Holds a message that may be a list of calls; gives on any other at once."""

    def __init__(self) -> None:
        self._held: str | None = ""  # None: the message is content

    def push(self, text: str) -> list[Event]:
        """See ToolStream."""
        if self._held is None:
            return [ContentDelta(text)] if text else []
        self._held += text
        if _BEGINS.match(self._held) or _MAY_BEGIN.fullmatch(self._held):
            return []
        held, self._held = self._held, None
        return [ContentDelta(held)]

    def finish(self) -> list[Event]:
        """See ToolStream."""
        held, self._held = self._held, None
        calls = _calls(held or "")
        if not calls:
            return [ContentDelta(held)] if held else []
        events: list[Event] = []
        for index, (name, arguments) in enumerate(calls):
            events.append(ToolCallStart(index, random_call_id(), name))
            events.append(ToolCallArguments(index, json.dumps(arguments, ensure_ascii=False)))
        return events


def _calls(message: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments; nothing when the message is anything else than a list of calls."""
    wrapped = _WRAPPING.fullmatch(message)
    source = (wrapped[1] if wrapped else message).strip()
    if not _BEGINS.match(source):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes that Python warns of
            tree = ast.parse(source, mode="eval").body
            if isinstance(tree, ast.List) and tree.elts:
                return [_call(node, source) for node in tree.elts]
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        pass
    return []


def _call(node: ast.expr, source: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with named arguments")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("** is no named argument")
        arguments[keyword.arg] = _value(keyword.value, source)
    json.dumps(arguments).encode()
    return ast.unparse(node.func), arguments


def _value(node: ast.expr, source: str) -> Any:
    """A value written as JSON or as Python, with JSON's words for constants anywhere."""
    try:
        return json.loads(ast.get_source_segment(source, node) or "")
    except ValueError:
        pass
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item, source) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [ast.literal_eval(key) if key is not None else None for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("keys must be strings")
        return {str(key): _value(value, source) for key, value in zip(keys, node.values, strict=True)}
    value = ast.literal_eval(node)
    if not isinstance(value, (str, int, float, bool, type(None))):
        raise ValueError("no value that JSON has")
    return value
