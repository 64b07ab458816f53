"""/v1/completions on the wire."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from trine.service.openai.structs.base import GenerationRequest, ResponseStruct, Usage
from trine.service.openai.structs.chat import ResponseFormat


class CompletionRequest(GenerationRequest, kw_only=True):
    """`prompt`: a text, a list of texts, token ids, or a list of those. `suffix` is refused: no model here infills."""

    prompt: str | list[str | int | list[int]]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None


class CompletionLogprobs(ResponseStruct, kw_only=True):
    """`text_offset`: where each token begins in the choice's text, in characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(ResponseStruct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length", "content_filter"] | None


class Completion(ResponseStruct, kw_only=True):
    """Both the whole answer and, with one choice and a part of its text, a `data:` line of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
