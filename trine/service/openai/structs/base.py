"""What the wire structs of several endpoints share."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType


class WireStruct(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request's object: a field it does not have is an error that names it."""


class ResponseStruct(msgspec.Struct, kw_only=True):
    """A response's object: fields left `UNSET` are not written, None is written as null."""


class StreamOptions(WireStruct, kw_only=True):
    """`include_obfuscation` is accepted: nothing is ever padded here."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Extensions(WireStruct, kw_only=True):
    """`nvext`, where NIM's clients put what OpenAI's API has no field for. The same names work at the top level."""

    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None


class GenerationRequest(WireStruct, kw_only=True):
    """Fields of chat and plain completions. null means: the default."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    user: str | None = None
    # Extensions from here on.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    use_beam_search: bool | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    bad_words: str | list[str] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    priority: int | None = None
    timeout: float | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    nvext: Extensions | None = None


class PromptTokensDetails(ResponseStruct, kw_only=True):
    cached_tokens: int


class CompletionTokensDetails(ResponseStruct, kw_only=True):
    reasoning_tokens: int


class Usage(ResponseStruct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class ErrorDetail(ResponseStruct, kw_only=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(ResponseStruct, kw_only=True):
    """OpenAI's error body."""

    error: ErrorDetail
