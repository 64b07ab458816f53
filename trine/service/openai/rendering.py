"""Conversations become prompts: the wire's messages and tools in the form that chat templates take."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from trine.core.errors import RequestError
from trine.service.openai.parsing import drop_nulls
from trine.service.openai.prompts import LONG_TEXT
from trine.service.openai.structs.chat import AssistantMessage, ChatRequest, Message, Tool, ToolCall

if TYPE_CHECKING:
    from trine.llm.tokenizer import Tokenizer
    from trine.service.openai.context import Service
    from trine.service.openai.structs.tokens import TokenizeRequest

_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "chat_template", "continue_final_message"})


async def render(
    service: Service, tokenizer: Tokenizer, body: ChatRequest | TokenizeRequest, *, tools: Sequence[Tool] | None
) -> str:
    """The prompt's text. A template of the request's own, or a long conversation, is rendered in a thread."""
    assert body.messages is not None
    if not body.messages:
        raise RequestError("messages is empty: give at least one message", param="messages")
    variables = template_variables(body)
    continued = bool(body.continue_final_message)
    if continued:
        variables["continue_final_message"] = True
    add_generation_prompt = body.add_generation_prompt if body.add_generation_prompt is not None else not continued

    def run() -> str:
        assert body.messages is not None
        return tokenizer.render_chat(
            [plain_message(message) for message in body.messages],
            tools=[drop_nulls(tool) for tool in tools] if tools else None,
            add_generation_prompt=add_generation_prompt,
            chat_template=body.chat_template or service.settings.chat_template,
            **variables,
        )

    size = sum(len(message.content) for message in body.messages if isinstance(message.content, str))
    if body.chat_template is None and size < LONG_TEXT:
        return run()
    return await asyncio.to_thread(run)


def template_variables(body: ChatRequest | TokenizeRequest) -> dict[str, Any]:
    """What the template may look at beside messages and tools."""
    variables: dict[str, Any] = {}
    if isinstance(body, ChatRequest) and body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
        if body.reasoning_effort == "none":
            variables["enable_thinking"] = False
    for name, value in (body.chat_template_kwargs or {}).items():
        if name in _RESERVED:
            raise RequestError(
                f"chat_template_kwargs.{name} is a field of the request itself: give it there",
                param=f"chat_template_kwargs.{name}",
            )
        variables[name] = value
    return variables


def plain_message(message: Message) -> dict[str, Any]:
    """A message as a template sees it; a `function_call` of old becomes a tool call."""
    if isinstance(message, AssistantMessage) and message.function_call is not None and not message.tool_calls:
        message.tool_calls = [ToolCall(id="call_0", function=message.function_call)]
        message.function_call = None
    plain: dict[str, Any] = msgspec.to_builtins(message)
    return {
        key: value
        for key, value in plain.items()
        if value is not None and key not in ("parsed", "audio", "annotations")
    }
