"""The wire's fields become `SamplingParams`: names, defaults and the limits that OpenAI's API adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trine.core.errors import RequestError
from trine.llm.sampling.params import GuidedParams, SamplingParams
from trine.service.openai.structs.base import GenerationRequest
from trine.service.openai.structs.chat import (
    EbnfFormat,
    JsonObjectFormat,
    JsonSchemaFormat,
    RegexFormat,
    ResponseFormat,
    TextFormat,
)

MAX_STOP = 4
MAX_TOP_LOGPROBS = 20
_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
_COPIED = (
    "n",
    "best_of",
    "temperature",
    "top_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "length_penalty",
    "early_stopping",
    "use_beam_search",
    "include_stop_str_in_output",
    "skip_special_tokens",
)
_IN_NVEXT = ("top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens")


def sampling_params(
    request: GenerationRequest,
    *,
    max_tokens: int | None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    guided: GuidedParams | None = None,
    defaults: Mapping[str, Any],
) -> SamplingParams:
    """The request's sampling parameters; where it has none the model's `defaults`, else `SamplingParams`' own.

    RequestError names a bad one.
    """
    values: dict[str, Any] = {
        **defaults,
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
    }
    for name in _COPIED:
        value = getattr(request, name)
        if value is not None:
            values[name] = value
    for name in _IN_NVEXT:
        value = _top_level_or_nvext(request, name)
        if value is not None:
            values[name] = value
    if request.use_beam_search and request.temperature is None:
        values["temperature"] = 0.0
    if request.stop is not None:
        values["stop"] = _stop(request.stop)
    if request.bad_words is not None:
        values["bad_words"] = (request.bad_words,) if isinstance(request.bad_words, str) else tuple(request.bad_words)
    if request.stop_token_ids is not None:
        values["stop_token_ids"] = tuple(request.stop_token_ids)
    if request.logit_bias:
        values["logit_bias"] = _logit_bias(request.logit_bias)
    if guided is not None:
        values["guided"] = guided
    params = SamplingParams(**values)
    if request.stream and (params.use_beam_search or params.num_sequences > params.n):
        name = "use_beam_search" if params.use_beam_search else "best_of"
        raise RequestError(f"{name} can't be streamed: the best is known only at the end; leave out stream", param=name)
    return params


def guided_params(request: GenerationRequest, response_format: ResponseFormat | None) -> GuidedParams | None:
    """What guided_*, nvext.guided_* and response_format ask for; RequestError if that is more than one thing."""
    asked: dict[str, GuidedParams] = {}
    for wire_name, name in _GUIDED.items():
        value = _top_level_or_nvext(request, wire_name)
        if value is not None:
            arguments: dict[str, Any] = {name: tuple(value) if name == "choice" else value}
            asked[wire_name] = GuidedParams(**arguments)
    by_format = response_format_params(response_format)
    if by_format is not None:
        asked["response_format"] = by_format
    if len(asked) > 1:
        names = sorted(asked)
        raise RequestError(f"{' and '.join(names)} can't be combined: give one of them", param=names[0])
    return next(iter(asked.values()), None)


def response_format_params(response_format: ResponseFormat | None) -> GuidedParams | None:
    """The language of a response_format; None for free text. A JSON schema guides whether or not it says `strict`."""
    match response_format:
        case None | TextFormat():
            return None
        case JsonObjectFormat():
            return GuidedParams(json_object=True)
        case JsonSchemaFormat():
            schema = response_format.json_schema.schema_
            return GuidedParams(json_object=True) if schema is None else GuidedParams(json=schema)
        case RegexFormat():
            return GuidedParams(regex=response_format.regex)
        case EbnfFormat():
            return GuidedParams(grammar=response_format.ebnf)


def deadline(request: GenerationRequest) -> float | None:
    """Seconds from now that the request may take."""
    if request.timeout is not None and request.timeout <= 0:
        raise RequestError(f"timeout={request.timeout} must be above 0 (seconds)", param="timeout")
    return request.timeout


def check_top_logprobs(name: str, value: int | None) -> None:
    if value is not None and not 0 <= value <= MAX_TOP_LOGPROBS:
        raise RequestError(f"{name}={value} is out of range: it must be from 0 to {MAX_TOP_LOGPROBS}", param=name)


def check_stream_options(request: GenerationRequest) -> bool:
    """Whether the stream ends with usage. RequestError for stream_options without stream, as OpenAI's service does."""
    if request.stream_options is None:
        return False
    if not request.stream:
        raise RequestError("stream_options is only for stream=true: leave it out or stream", param="stream_options")
    return bool(request.stream_options.include_usage)


def _top_level_or_nvext(request: GenerationRequest, name: str) -> Any:
    value = getattr(request, name)
    if value is None and request.nvext is not None:
        return getattr(request.nvext, name)
    return value


def _stop(stop: str | list[str]) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(texts) > MAX_STOP:
        raise RequestError(f"stop has {len(texts)} texts: give at most {MAX_STOP}", param="stop")
    return texts


def _logit_bias(bias: dict[int, float]) -> dict[int, float]:
    for token_id, value in bias.items():
        if not -100 <= value <= 100:
            raise RequestError(f"logit_bias[{token_id}]={value} must be from -100 to 100", param="logit_bias")
    return bias
