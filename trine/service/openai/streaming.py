"""Server-sent events, built from bytes that are made once a request.

A streamed token is the path that runs most often: one concatenation around the JSON text of what is new.
"""

from __future__ import annotations

from typing import Any

import msgspec

from trine.core.errors import TrineError
from trine.service.openai.errors import error_body
from trine.service.openai.structs.base import Usage
from trine.service.openai.structs.chat import ChatCompletionChunk, ChoiceDelta, ChoiceLogprobs
from trine.service.openai.structs.completions import Completion, CompletionLogprobs

DONE = b"data: [DONE]\n\n"
encode = msgspec.json.Encoder().encode


class ChatChunks:
    """The `data:` lines of a chat stream. With `with_usage` each says usage null, until the last one."""

    def __init__(self, template: ChatCompletionChunk, num_choices: int, *, with_usage: bool) -> None:
        template.usage = None if with_usage else msgspec.UNSET
        self._heads = choice_heads(template, num_choices, b'"delta":')
        self._content_heads = [head + b'{"content":' for head in self._heads]
        self._template = template

    def content(self, choice: int, text: str) -> bytes:
        """New text and nothing else: nearly every chunk."""
        return b"".join((self._content_heads[choice], encode(text), b'},"logprobs":null,"finish_reason":null}]}\n\n'))

    def delta(
        self,
        choice: int,
        delta: ChoiceDelta,
        *,
        logprobs: ChoiceLogprobs | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        return b'%s%s,"logprobs":%s,"finish_reason":%s}]}\n\n' % (
            self._heads[choice],
            encode(delta),
            encode(logprobs),
            encode(finish_reason),
        )

    def usage(self, usage: Usage) -> bytes:
        return last_chunk(self._template, usage)


class CompletionChunks:
    """The `data:` lines of a plain completion's stream; `with_usage` as for chat."""

    def __init__(self, template: Completion, num_choices: int, *, with_usage: bool) -> None:
        template.usage = None if with_usage else msgspec.UNSET
        self._heads = choice_heads(template, num_choices, b'"text":')
        self._template = template

    def content(self, choice: int, text: str) -> bytes:
        return b"".join((self._heads[choice], encode(text), b',"logprobs":null,"finish_reason":null}]}\n\n'))

    def text(
        self, choice: int, text: str, *, logprobs: CompletionLogprobs | None = None, finish_reason: str | None = None
    ) -> bytes:
        return b'%s%s,"logprobs":%s,"finish_reason":%s}]}\n\n' % (
            self._heads[choice],
            encode(text),
            encode(logprobs),
            encode(finish_reason),
        )

    def usage(self, usage: Usage) -> bytes:
        return last_chunk(self._template, usage)


def choice_heads(template: ChatCompletionChunk | Completion, num_choices: int, field: bytes) -> list[bytes]:
    """`data: {…,"choices":[{"index":i,FIELD` for each choice. `template` has no choices."""
    fields: dict[str, Any] = msgspec.to_builtins(template)
    del fields["choices"]
    constant = b"data: " + encode(fields)[:-1] + b',"choices":[{"index":'
    return [constant + b"%d," % index + field for index in range(num_choices)]


def last_chunk(template: ChatCompletionChunk | Completion, usage: Usage) -> bytes:
    """No choices, but the usage."""
    template.usage = usage
    return b"data: %s\n\n" % encode(template)


def error_event(error: TrineError) -> bytes:
    """What ends a stream that fails on its way."""
    return b"data: %s\n\n" % error_body(error)
