"""Conversations as prompts, by the Jinja template that a checkpoint brings."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError

from trine.core.errors import RequestError
from trine.llm.chat.sandbox import BoundedEnvironment, TemplateLimitError, render

Message = dict[str, Any]

_END_OF_FINAL = "\ue000end-of-final-message\ue000 "
"""Marks where a continued message ends; the space shows whether the template trims."""
_PROBE = "\ue000probe\ue000"


class ChatTemplates:
    """A checkpoint's chat templates by name; `default` is the main one, `tool_use` is preferred with tools."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.sources = dict(sources)

    def __bool__(self) -> bool:
        return bool(self.sources)

    def source(self, chat_template: str | None = None, with_tools: bool = False) -> str:
        """The Jinja source to use: `chat_template` is a name here or itself a source. Raises RequestError without
        one.
        """
        if chat_template is not None:
            return self.sources.get(chat_template, chat_template)
        for name in ("tool_use", "default") if with_tools else ("default",):
            if name in self.sources:
                return self.sources[name]
        if len(self.sources) == 1:
            return next(iter(self.sources.values()))
        if self.sources:
            names = ", ".join(sorted(self.sources))
            raise RequestError(
                f"chat_template: the model has no default one; name one of {names}", param="chat_template"
            )
        raise RequestError(
            "the model has no chat template: send chat_template with the request, give one when serving, or use the "
            "completions endpoint with a prompt",
            param="messages",
        )

    def render(
        self,
        messages: list[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. `continue_final_message` among the variables leaves the last message open for the model to go
        on.
        """
        given = dict(variables or {})
        continued = bool(given.pop("continue_final_message", False))
        if continued and add_generation_prompt:
            raise RequestError(
                "continue_final_message needs add_generation_prompt=false: either the last message goes on, or a new "
                "one begins",
                param="continue_final_message",
            )
        source = self.source(chat_template, bool(tools))
        prepared = prepare_messages(messages, source)
        final = _mark_final(prepared) if continued else ""
        values = {"tools": tools or None, "documents": None, **given}
        text = render_source(source, prepared, add_generation_prompt=add_generation_prompt, **values)
        return _cut_final(text, final) if continued else text


def render_source(source: str, messages: list[Message], **variables: Any) -> str:
    """The text of one template. Whatever goes wrong in it is a RequestError."""
    template = compile_template(source)
    try:
        return render(template, {"messages": messages, **variables})
    except TemplateLimitError as error:
        raise RequestError(f"the chat template was stopped: {error}", param="chat_template") from error
    except TemplateError as error:  # raise_exception among them: the model's own words on what it can't take
        raise RequestError(f"the chat template refuses the messages: {error}", param="messages") from error
    except Exception as error:  # templates are programs: any Python error can come out
        raise RequestError(
            f"the chat template fails on these messages: {type(error).__name__}: {error}", param="messages"
        ) from error


@functools.lru_cache(maxsize=64)
def compile_template(source: str) -> Template:
    """Raises RequestError for bad syntax."""
    try:
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise RequestError(f"chat_template line {error.lineno}: {error.message}", param="chat_template") from error
    except RecursionError as error:
        raise RequestError("chat_template is nested too deeply", param="chat_template") from error


@functools.cache
def _environment() -> BoundedEnvironment:
    return BoundedEnvironment()


def prepare_messages(messages: list[Message], source: str) -> list[Message]:
    """Messages in the form in which templates expect them; the argument is left alone.

    Text parts become one string unless the template reads parts; arguments of earlier tool calls become objects; keys
    with a null, except for content, are dropped; a `developer` is `system` to templates that do not know the role.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list with at least one message", param="messages")
    wants = content_format(source)
    short_ids = re.search(r"length\s*!=\s*9", source) is not None
    prepared = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{index}] must be an object with a role", param=f"messages[{index}]")
        result = {key: value for key, value in message.items() if value is not None}
        result["content"] = _content(message.get("content"), wants, f"messages[{index}].content")
        if result["content"] is None and ("tool_calls" not in result or "tool_calls" not in source):
            result["content"] = ""
        if result["role"] == "developer" and "developer" not in source:
            result["role"] = "system"
        if "tool_calls" in result:
            result["tool_calls"] = [_tool_call(call, short_ids) for call in result["tool_calls"]]
        if short_ids and isinstance(result.get("tool_call_id"), str):
            result["tool_call_id"] = _short_id(result["tool_call_id"])
        prepared.append(result)
    return prepared


def _content(content: Any, wants: str, where: str) -> Any:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if wants == "parts" else content
    if content is None:
        return None
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of parts, not {type(content).__name__}", param=where)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if kind == "refusal":
            text = part.get("refusal")
        elif kind not in ("text", "input_text", "output_text"):
            raise RequestError(
                f"{where}[{index}] has type {kind!r}; this model takes text only: send parts of type 'text'",
                param=where,
            )
        if not isinstance(text, str):
            raise RequestError(f"{where}[{index}] must be an object with type 'text' and a string in text", param=where)
        texts.append(text)
    if wants == "string":
        return "\n".join(texts)
    return [{"type": "text", "text": text} for text in texts]


def _tool_call(call: Any, short_ids: bool) -> Any:
    """A call of an earlier turn, its arguments as an object: clients send JSON text, templates print objects."""
    if not isinstance(call, Mapping):
        return call
    result = dict(call)
    function = result.get("function")
    if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"] or "{}")
        except ValueError:
            arguments = None
        if isinstance(arguments, dict):
            result["function"] = {**function, "arguments": arguments}
    if short_ids and isinstance(result.get("id"), str):
        result["id"] = _short_id(result["id"])
    return result


def _short_id(identifier: str) -> str:
    """An id of nine letters and digits, which Mistral's templates insist on; the same for the call and its result."""
    if len(identifier) == 9 and identifier.isalnum():
        return identifier
    return hashlib.sha256(identifier.encode("utf-8", "surrogatepass")).hexdigest()[:9]


@functools.lru_cache(maxsize=64)
def content_format(source: str) -> str:
    """What `content` may be to a template: "string" (only), "parts" (only a list of them) or "both". Found by trying
    it.
    """

    def shows(content: Any) -> bool:
        try:
            text = render_source(
                source, [{"role": "user", "content": content}], tools=None, add_generation_prompt=False
            )
        except RequestError:
            return False
        return _PROBE in text and "'text'" not in text and '"text"' not in text

    if not shows([{"type": "text", "text": _PROBE}]):
        return "string"
    return "both" if shows(_PROBE) else "parts"


def _mark_final(messages: list[Message]) -> str:
    """Puts the mark at the end of the last message's text; returns that text."""
    last = messages[-1]
    content = last["content"]
    if isinstance(content, list) and content:
        final: str = content[-1]["text"]
        last["content"] = [*content[:-1], {"type": "text", "text": final + _END_OF_FINAL}]
    elif isinstance(content, str) and content:
        final = content
        last["content"] = final + _END_OF_FINAL
    else:
        raise RequestError(
            "continue_final_message: the last message has no text to continue", param="continue_final_message"
        )
    return final


def _cut_final(text: str, final: str) -> str:
    """The prompt up to the mark; without the message's trailing space where the template trims it."""
    end = text.rfind(_END_OF_FINAL.rstrip())
    if end < 0 or final.strip() not in text:
        raise RequestError(
            "continue_final_message: the chat template drops or changes the last message",
            param="continue_final_message",
        )
    return text[:end] if text.startswith(_END_OF_FINAL, end) else text[:end].rstrip()
