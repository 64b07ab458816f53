"""Grammars that make a call of a tool certain, in the syntax that a model was trained on.

They are in llguidance's dialect of Lark (github.com/guidance-ai/llguidance, docs/syntax.md), which takes JSON schemas
as rules, so that the words around the arguments and the arguments are one grammar.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trine.core.errors import RequestError
from trine.llm.sampling.params import GuidedParams
from trine.llm.sampling.schema import prepare_schema

if TYPE_CHECKING:
    from trine.llm.tokenizer import Tokenizer

Tool = dict[str, Any]

_SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as chat templates print it (Python's json.dumps), which is what models saw."""
_EXACT = {"lenient": False, "coerce_one_of": False}
"""What the grammar library can't enforce is an error."""


@dataclass(frozen=True, slots=True)
class JsonCallForm:
    """The text of forced calls: `begin`, calls with `separator` between them, `end`; `open` and `close` around each.

    All are sequences of literal texts; one that is a single token of the vocabulary is forced as that token.
    """

    arguments_key: str = "arguments"
    begin: tuple[str, ...] = ()
    end: tuple[str, ...] = ()
    open: tuple[str, ...] = ()
    close: tuple[str, ...] = ()
    separator: str = ""


def forced_json_calls(
    form: JsonCallForm, tools: Sequence[Tool], choice: str | None, parallel: bool, tokenizer: Tokenizer | None
) -> GuidedParams:
    """One call, or with `parallel` and no `choice` one or more. Raises RequestError for tools that can't be called."""
    functions = functions_to_call(tools, choice)
    repeated = f"({literal(form.separator)} call)*" if parallel and choice is None else ""
    rules = [
        f"start: {_words(form.begin, tokenizer)} call {repeated} {_words(form.end, tokenizer)}",
        f"call: {_words(form.open, tokenizer)} function {_words(form.close, tokenizer)}",
        "function: " + " | ".join(f"call_{index}" for index in range(len(functions))),
    ]
    for index, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "{form.arguments_key}": '
        rules.append(f'call_{index}: {literal(head)} arguments_{index} "}}"')
        rules.append(f"arguments_{index}: %json {json.dumps(arguments_schema(function))}")
    return GuidedParams(grammar="\n".join(rules) + "\n")


def functions_to_call(tools: Sequence[Tool], choice: str | None) -> list[Mapping[str, Any]]:
    """The `function` objects among which to choose."""
    functions = [tool["function"] for tool in tools if isinstance(tool.get("function"), Mapping)]
    if not functions:
        raise RequestError(
            "tool_choice asks for a call, but tools is empty: send at least one tool", param="tool_choice"
        )
    if choice is None:
        return functions
    chosen = [function for function in functions if function["name"] == choice]
    if not chosen:
        names = ", ".join(repr(function["name"]) for function in functions)
        raise RequestError(f"tool_choice names {choice!r}, which is not among the tools: {names}", param="tool_choice")
    return chosen[:1]


def arguments_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of a function's arguments, for a grammar. A function without parameters takes none."""
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "additionalProperties": False}
    if not isinstance(parameters, Mapping):
        raise RequestError(
            f"tools: parameters of {function['name']!r} must be a JSON schema of an object", param="tools"
        )
    try:
        schema = prepare_schema({"type": "object", **parameters})
    except RequestError as error:
        raise RequestError(f"tools: parameters of {function['name']!r}: {error.message}", param="tools") from error
    return {**schema, "x-guidance": _SEPARATORS | _EXACT}


def literal(text: str) -> str:
    """A text as a Lark string."""
    return json.dumps(text, ensure_ascii=False)


def _words(texts: Sequence[str], tokenizer: Tokenizer | None) -> str:
    return " ".join(_word(text, tokenizer) for text in texts)


def _word(text: str, tokenizer: Tokenizer | None) -> str:
    """A text as a literal; as a token where the vocabulary has it as an added one (`<[id]>` in the grammar).

    Added tokens have no other spelling that the model has seen, and special ones can't be had by a literal.
    """
    index = None if tokenizer is None else tokenizer.hf.token_to_id(text)
    if index is None or tokenizer is None or index not in tokenizer.hf.get_added_tokens_decoder():
        return literal(text)
    return f"<[{index}]>"
