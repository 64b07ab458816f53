"""Tools and reasoning: which parser reads a model's text, and what a tool_choice makes of the request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec

from trine.core.errors import RequestError
from trine.llm.chat.events import Event, ToolCallArguments, ToolCallStart
from trine.llm.chat.output import MessageStream
from trine.llm.chat.reasoning_parsers import ReasoningParser, detect_reasoning_parser, get_reasoning_parser
from trine.llm.chat.tool_parsers import ToolParser, detect_tool_parser, get_tool_parser
from trine.llm.sampling.params import GuidedParams
from trine.service.openai.structs.chat import AllowedTools, ChatRequest, NamedTool, Tool

if TYPE_CHECKING:
    from trine.llm.tokenizer import Tokenizer
    from trine.service.settings import ServiceSettings

MAX_TOOLS = 128
FALLBACK_PARSER = "hermes"
"""The notation of forced calls for models whose own is not known: the grammar makes them write it."""
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class OutputParser(Protocol):
    """Turns one choice's text into events, whole or bit by bit."""

    def push(self, text: str) -> list[Event]: ...
    def finish(self) -> list[Event]: ...


@dataclass(frozen=True, slots=True)
class ToolUse:
    """shown: the tools that the prompt describes. forced: the language of the answer when tools must be called."""

    shown: Sequence[Tool]
    parser: ToolParser | None
    forced: GuidedParams | None
    single: bool


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How one request's choices are read."""

    tool_use: ToolUse | None
    reasoning: ReasoningParser | None

    @property
    def needs_special_tokens(self) -> bool:
        tools = self.tool_use.parser if self.tool_use is not None else None
        return any(parser is not None and parser.needs_special_tokens for parser in (tools, self.reasoning))

    def parser(self, prompt: str) -> OutputParser | None:
        """A parser for one choice that follows `prompt`; None when the text is the content as it stands."""
        tools = self.tool_use.parser if self.tool_use is not None else None
        if tools is None and self.reasoning is None:
            return None
        stream = MessageStream(tools, self.reasoning, prompt)
        return FirstCallOnly(stream) if self.tool_use is not None and self.tool_use.single else stream


class FirstCallOnly:
    """Drops the calls after the first, for parallel_tool_calls=false."""

    def __init__(self, parser: OutputParser) -> None:
        self._parser = parser

    def push(self, text: str) -> list[Event]:
        return self._first(self._parser.push(text))

    def finish(self) -> list[Event]:
        return self._first(self._parser.finish())

    def _first(self, events: list[Event]) -> list[Event]:
        return [
            event for event in events if not isinstance(event, ToolCallStart | ToolCallArguments) or not event.index
        ]


def check_parser_names(settings: ServiceSettings) -> None:
    """ConfigurationError for a parser that does not exist."""
    if settings.tool_parser not in ("auto", "none"):
        get_tool_parser(settings.tool_parser)
    if settings.reasoning_parser not in ("auto", "none"):
        get_reasoning_parser(settings.reasoning_parser)


def output_format(
    settings: ServiceSettings, tokenizer: Tokenizer, body: ChatRequest, guided: GuidedParams | None
) -> OutputFormat:
    """How to read what the model will write. RequestError for tools that can't be offered, or called as asked."""
    template = tokenizer.chat_templates.source(body.chat_template or settings.chat_template, bool(body.tools))
    tool_use = choose_tools(settings, tokenizer, template, body)
    reasoning = None
    # A guided answer begins in its language: nothing is thought aloud.
    if guided is None and (tool_use is None or tool_use.forced is None) and settings.reasoning_parser != "none":
        name: str | None = settings.reasoning_parser
        name = detect_reasoning_parser(template) if name == "auto" else name
        reasoning = get_reasoning_parser(name) if name is not None else None
    return OutputFormat(tool_use, reasoning)


def choose_tools(settings: ServiceSettings, tokenizer: Tokenizer, template: str, body: ChatRequest) -> ToolUse | None:
    """What becomes of tools and tool_choice; None when no tool can be called."""
    tools = body.tools or []
    _check_tools(tools)
    choice = body.tool_choice
    if choice not in (None, "none", "auto") and not tools:
        raise RequestError("tool_choice needs tools: give the functions that may be called", param="tool_choice")
    if not tools or choice == "none":
        return None
    named: str | None = None
    if isinstance(choice, AllowedTools):
        tools = [_find(tools, allowed.function.name) for allowed in choice.allowed_tools.tools]
        must = choice.allowed_tools.mode == "required"
    elif isinstance(choice, NamedTool):
        named, must = _find(tools, choice.function.name).function.name, True
    else:
        must = choice == "required"
    parser = _tool_parser(settings, template, must)
    parallel = body.parallel_tool_calls is not False and named is None
    forced = None
    if must:
        assert parser is not None
        forced = parser.forced_calls([drop_nulls(tool) for tool in tools], named, parallel, tokenizer)
    return ToolUse(tools, parser, forced, single=not parallel)


def drop_nulls(tool: Tool) -> dict[str, object]:
    """A tool without the fields that the client left out: templates print what they are given."""
    function = {key: value for key, value in msgspec.to_builtins(tool.function).items() if value is not None}
    return {"type": "function", "function": function}


def _tool_parser(settings: ServiceSettings, template: str, must: bool) -> ToolParser | None:
    name: str | None = settings.tool_parser
    if name == "none":
        if must:
            raise RequestError("this service reads no tool calls: it runs with --tool-parser none", param="tool_choice")
        return None
    if name == "auto":
        name = detect_tool_parser(template)
    if name is None and must:
        name = FALLBACK_PARSER
    if name is None and "tools" not in template:
        raise RequestError(
            "this model's chat template knows no tools: leave tools out, or force a call with tool_choice",
            param="tools",
        )
    return get_tool_parser(name) if name is not None else None


def _check_tools(tools: Sequence[Tool]) -> None:
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools has {len(tools)} functions: give at most {MAX_TOOLS}", param="tools")
    names: set[str] = set()
    for index, tool in enumerate(tools):
        name = tool.function.name
        if not _TOOL_NAME.fullmatch(name):
            raise RequestError(
                f"tools[{index}].function.name={name!r}: give 1 to 64 letters, digits, '_', '-' or '.'",
                param=f"tools[{index}].function.name",
            )
        if name in names:
            raise RequestError(f"tools has two functions called {name!r}: name them apart", param="tools")
        names.add(name)


def _find(tools: Sequence[Tool], name: str) -> Tool:
    for tool in tools:
        if tool.function.name == name:
            return tool
    known = ", ".join(tool.function.name for tool in tools)
    raise RequestError(f"tool_choice: there is no tool {name!r} among {known}", param="tool_choice")
