"""Parsers of tool calls, by name. Other packages add theirs under the entry point group `trine.tool_parsers`."""

from __future__ import annotations

import functools
from importlib.metadata import entry_points

from trine.core.errors import ConfigurationError
from trine.llm.chat.tool_parsers.base import ToolParser, ToolStream, collect, parse
from trine.llm.chat.tool_parsers.formats import HermesParser, Llama3JsonParser, MistralParser
from trine.llm.chat.tool_parsers.pythonic import PythonicParser

__all__ = [
    "ToolParser",
    "ToolStream",
    "collect",
    "detect_tool_parser",
    "get_tool_parser",
    "parse",
    "tool_parser_names",
]

ENTRY_POINTS = "trine.tool_parsers"
_ALIASES = {"qwen": "hermes", "qwen2_5": "hermes", "qwen3": "hermes", "llama3": "llama3_json", "llama": "llama3_json"}


@functools.cache
def _parsers() -> dict[str, ToolParser]:
    """Ours first; an entry point names a class (or a function) that makes a ToolParser, and may replace one of ours."""
    ours: list[ToolParser] = [HermesParser(), Llama3JsonParser(), MistralParser(), PythonicParser()]
    found = {parser.name: parser for parser in ours}
    for entry in entry_points(group=ENTRY_POINTS):
        parser: ToolParser = entry.load()()
        found[entry.name] = parser
    return found


def tool_parser_names() -> list[str]:
    """All names that `get_tool_parser` takes."""
    return sorted({*_parsers(), *_ALIASES})


def get_tool_parser(name: str) -> ToolParser:
    """The parser of this name; ConfigurationError when there is none."""
    parser = _parsers().get(name) or _parsers().get(_ALIASES.get(name, ""))
    if parser is None:
        raise ConfigurationError(
            f"tool_call_parser={name!r} is unknown; choose one of {', '.join(tool_parser_names())}",
            param="tool_call_parser",
        )
    return parser


def detect_tool_parser(chat_template: str | None) -> str | None:
    """The name of the parser for models with this chat template; None when no parser recognises it."""
    for name, parser in _parsers().items():
        if chat_template and parser.detect(chat_template):
            return name
    return None
