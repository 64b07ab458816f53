"""The formats in which the families that Trine serves call tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trine.llm.chat.events import random_call_id
from trine.llm.chat.tool_parsers.base import CallSyntax, JsonCallStream, Tool, ToolStream
from trine.llm.chat.tool_parsers.grammar import JsonCallForm, forced_json_calls
from trine.llm.sampling.params import GuidedParams

if TYPE_CHECKING:
    from trine.llm.tokenizer import Tokenizer


class _JsonParser:
    """A parser of calls that are JSON objects: a syntax to read and a form to force."""

    name: str
    needs_special_tokens = False
    syntax: CallSyntax
    form: JsonCallForm

    def stream(self) -> ToolStream:
        """See ToolParser."""
        return JsonCallStream(self.syntax, self.new_id)

    def forced_calls(
        self, tools: Sequence[Tool], choice: str | None, parallel: bool, tokenizer: Tokenizer | None = None
    ) -> GuidedParams:
        """See ToolParser."""
        return forced_json_calls(self.form, tools, choice, parallel, tokenizer)

    def new_id(self) -> str:
        """An id for the next call."""
        return random_call_id()


class HermesParser(_JsonParser):
    """Hermes 2 and later, Qwen 2.5 and 3: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, one a call."""

    name = "hermes"
    syntax = CallSyntax(open="<tool_call>", close="</tool_call>")
    form = JsonCallForm(open=("<tool_call>", "\n"), close=("\n", "</tool_call>"), separator="\n")

    def detect(self, chat_template: str) -> bool:
        """Qwen3-Coder's tags of the same name hold XML, not JSON."""
        return "<tool_call>" in chat_template and "<function=" not in chat_template


class Llama3JsonParser(_JsonParser):
    """Llama 3.1 to 3.3: the message is `{"name": …, "parameters": {…}}`, perhaps after `<|python_tag|>`; `;` between
    calls.
    """

    name = "llama3_json"
    syntax = CallSyntax(open="<|python_tag|>", bare=True, separators=";,", arguments_required=True)
    form = JsonCallForm(arguments_key="parameters", separator="; ")

    def detect(self, chat_template: str) -> bool:
        """The template prints earlier calls with the key `parameters`, which no other family does."""
        return "parameters" in chat_template and (
            "<|python_tag|>" in chat_template
            or ("<|start_header_id|>" in chat_template and '"name": ' in chat_template)
        )


class MistralParser(_JsonParser):
    """Mistral: `[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]`; newer models `[TOOL_CALLS]name[ARGS]{…}` a call.

    Ids have nine letters and digits: Mistral's templates refuse others.
    """

    name = "mistral"
    needs_special_tokens = True
    syntax = CallSyntax(open="[TOOL_CALLS]", bracketed=True, separators=",", named=True)
    form = JsonCallForm(begin=("[TOOL_CALLS]", " ["), end=("]",), separator=", ")

    def new_id(self) -> str:
        """See the class."""
        return random_call_id("", 9)

    def detect(self, chat_template: str) -> bool:
        """By the marker."""
        return "[TOOL_CALLS]" in chat_template
