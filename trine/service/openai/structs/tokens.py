"""/tokenize and /detokenize on the wire."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, UnsetType

from trine.service.openai.structs.base import ResponseStruct, WireStruct
from trine.service.openai.structs.chat import Message, Tool


class TokenizeRequest(WireStruct, kw_only=True):
    """Either `prompt` or `messages` (written out by the chat template first)."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class TokenizeResponse(ResponseStruct, kw_only=True):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | UnsetType = UNSET


class DetokenizeRequest(WireStruct, kw_only=True):
    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool | None = None


class DetokenizeResponse(ResponseStruct, kw_only=True):
    prompt: str
