"""What a model's text holds beside content: reasoning and tool calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from trine.llm.sampling.params import GuidedParams
from trine.service.openai.structs.chat import ChatRequest, Tool

if TYPE_CHECKING:
    from trine.llm.tokenizer import Tokenizer
    from trine.service.openai.context import Service


@dataclass(slots=True)
class ToolCallPiece:
    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(slots=True)
class Piece:
    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCallPiece] = field(default_factory=list)


class OutputParser(Protocol):
    def push(self, text: str) -> list[Piece]: ...
    def finish(self) -> list[Piece]: ...


@dataclass(slots=True)
class ToolUse:
    shown: list[Tool]
    forced: GuidedParams | None


def choose_tools(service: Service, tokenizer: Tokenizer, body: ChatRequest) -> ToolUse | None:
    if not body.tools:
        return None
    return ToolUse(body.tools, None)


def output_parser(service: Service, tokenizer: Tokenizer, prompt: str, tools: ToolUse | None) -> OutputParser | None:
    return None
