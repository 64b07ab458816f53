"""Strict decoding of request bodies, with errors that say what to change.

msgspec checks names and types at C speed; only when it refuses is the path walked again to say which field was
meant, or which values a field takes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any, Generic, NoReturn, TypeVar

import msgspec
from msgspec import inspect

from trine.core.errors import RequestError

StructT = TypeVar("StructT", bound=msgspec.Struct)

_LOCATION = re.compile(r" - at `(?:key` in `)?\$(?P<path>[^`]*)`$")
_UNKNOWN_FIELD = re.compile(r"^Object contains unknown field `(?P<name>.*)`$", re.DOTALL)
_MISSING_FIELD = re.compile(r"^Object missing required field `(?P<name>.*)`$")
_INVALID_VALUE = re.compile(r"^Invalid (?:enum )?value (?P<value>.*)$", re.DOTALL)
_WRONG_TYPE = re.compile(r"^Expected `(?P<expected>.*)`, got `(?P<got>.*)`$")
_STEP = re.compile(r"\.(?P<name>[^.\[\]]+)|\[(?P<index>\d+|\.\.\.)\]")

RENAMED = {
    "functions": "give the functions as tools",
    "function_call": "use tool_choice",
    "max_new_tokens": "use max_tokens",
    "audio": "this model gives text only",
    "web_search_options": "there is no web search here",
    "prompt_logprobs": "use /v1/completions with echo and logprobs",
}
"""Fields that clients know from elsewhere, and what to do instead."""


class RequestDecoder(Generic[StructT]):
    """Decodes JSON bodies into one struct type."""

    def __init__(self, type_: type[StructT]) -> None:
        self.type = type_
        self._decoder = msgspec.json.Decoder(type_)

    def decode(self, body: bytes) -> StructT:
        """The struct; RequestError (status 400) names the field and what it takes."""
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            self._explain(str(error), body)
        except RecursionError:
            raise RequestError("the body's JSON is nested too deeply", code="invalid_json") from None
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
            reason = "it is empty" if not body else str(error)
            raise RequestError(f"the body is not valid JSON: {reason}", code="invalid_json") from None

    def _explain(self, problem: str, body: bytes) -> NoReturn:
        location = _LOCATION.search(problem)
        path = location["path"] if location else ""
        problem = problem[: location.start()] if location else problem
        where = path.lstrip(".").replace("[...]", "")  # some value of an object: msgspec does not say which
        if match := _UNKNOWN_FIELD.match(problem):
            name = match["name"]
            hint = did_you_mean(name, self._fields(path, body))
            param = f"{where}.{name}" if where else name
            raise RequestError(f"{param!r} is not a field of this request{hint}", param=param, code="unknown_parameter")
        if match := _MISSING_FIELD.match(problem):
            param = f"{where}.{match['name']}" if where else match["name"]
            raise RequestError(f"{param!r} is missing: it is required", param=param, code="missing_required_parameter")
        if match := _INVALID_VALUE.match(problem):
            choices = self._choices(path, body)
            hint = f": it must be one of {', '.join(choices)}" if choices else ""
            raise RequestError(
                f"{where}={match['value']} is not possible{hint}", param=where or None, code="invalid_value"
            )
        if match := _WRONG_TYPE.match(problem):
            expected = match["expected"].replace(" | null", "").replace(" | ", " or ")
            what = repr(where) if where else "the body"
            raise RequestError(
                f"{what} has the wrong type: expected {expected}, got {match['got']}",
                param=where or None,
                code="invalid_type",
            )
        raise RequestError(f"{where or 'the body'}: {problem}", param=where or None, code="invalid_value")

    def _fields(self, path: str, body: bytes) -> list[str]:
        """Names that the object at `path` can have."""
        return [
            field.encode_name
            for node in self._types_at(path, body)
            if isinstance(node, inspect.StructType)
            for field in node.fields
        ]

    def _choices(self, path: str, body: bytes) -> list[str]:
        """Values that a literal, or a union's tag, at `path` can have."""
        choices: list[str] = []
        parent, _, last = path.rpartition(".")
        for node in self._types_at(path, body):
            if isinstance(node, inspect.LiteralType):
                choices += [str(value) for value in node.values]
        for node in self._types_at(parent, body, narrow=False):
            if isinstance(node, inspect.StructType) and node.tag_field == last:
                choices.append(str(node.tag))
        return choices

    def _types_at(self, path: str, body: bytes, *, narrow: bool = True) -> list[inspect.Type]:
        """The types allowed at `path`; of a tagged union, those that the data's tags select."""
        try:
            value: Any = msgspec.json.decode(body)
        except (msgspec.DecodeError, RecursionError):
            value = None
        nodes: list[inspect.Type] = [inspect.type_info(self.type)]
        for step in _STEP.finditer(path):
            nodes = _select(nodes, value)
            name, index = step["name"], step["index"]
            if name is not None:
                value = value.get(name) if isinstance(value, dict) else None
                nodes = [found for node in nodes for found in _field_types(node, name)]
            else:
                known = isinstance(value, list) and index != "..." and int(index) < len(value)
                value = value[int(index)] if known else None
                nodes = [
                    item
                    for node in nodes
                    if isinstance(node, inspect.ListType)
                    for item in _alternatives(node.item_type)
                ]
        return _select(nodes, value) if narrow else nodes


def did_you_mean(name: str, known: list[str]) -> str:
    """A remedy to end a sentence about an unknown name with."""
    if name in RENAMED:
        return f": {RENAMED[name]}"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f": did you mean {close[0]!r}?" if close else ": remove it"


def _alternatives(node: inspect.Type) -> Iterator[inspect.Type]:
    if isinstance(node, inspect.UnionType):
        yield from node.types
    else:
        yield node


def _field_types(node: inspect.Type, name: str) -> Iterator[inspect.Type]:
    if isinstance(node, inspect.StructType):
        for field in node.fields:
            if field.encode_name == name:
                yield from _alternatives(field.type)


def _select(nodes: list[inspect.Type], value: Any) -> list[inspect.Type]:
    """Drop the structs of a tagged union that `value`'s tag rules out."""
    if not isinstance(value, dict):
        return nodes
    kept = [
        node
        for node in nodes
        if not (isinstance(node, inspect.StructType) and node.tag_field) or value.get(node.tag_field) == node.tag
    ]
    return kept or nodes
