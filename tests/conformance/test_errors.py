"""Every class of error that the client knows, with OpenAI's body."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.conformance.harness import MODEL, Api, Server

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "frobnicate"}}}

BAD_CHAT: list[tuple[str, dict[str, Any], str]] = [
    ("temperature below 0", {"temperature": -1}, "temperature"),
    ("temperature of the wrong type", {"temperature": "hot"}, "temperature"),
    ("top_p of 0", {"top_p": 0}, "top_p"),
    ("n of 0", {"n": 0}, "n"),
    ("too many n", {"n": 1000}, "n"),
    ("max_tokens of 0", {"max_tokens": 0}, "max_tokens"),
    ("both limits", {"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
    ("five stops", {"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ("penalty above 2", {"presence_penalty": 3}, "presence_penalty"),
    ("penalty below -2", {"frequency_penalty": -3}, "frequency_penalty"),
    ("bias above 100", {"logit_bias": {"5": 101}}, "logit_bias"),
    ("bias of an unknown token", {"logit_bias": {"99999999": 1}}, "logit_bias"),
    ("too many top_logprobs", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("top_logprobs alone", {"top_logprobs": 2}, "top_logprobs"),
    ("a role that is none", {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ("no messages", {"messages": []}, "messages"),
    (
        "an image",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content",
    ),
    ("tool_choice without tools", {"tool_choice": "required"}, "tool_choice"),
    (
        "a tool that is not there",
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice",
    ),
    ("a bad tool name", {"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
    ("a format that is none", {"response_format": {"type": "xml"}}, "response_format.type"),
    ("two formats", {"response_format": {"type": "json_object"}, "extra_body": {"guided_regex": "a"}}, "guided_regex"),
    ("an unknown field", {"extra_body": {"temprature": 1}}, "temprature"),
    ("an unknown nested field", {"extra_body": {"nvext": {"guided_jsn": {}}}}, "nvext.guided_jsn"),
    ("old functions", {"functions": [{"name": "f"}]}, "functions"),
    ("a seed beyond 64 bits", {"seed": 2**70}, "seed"),
    ("a timeout of 0", {"extra_body": {"timeout": 0}}, "timeout"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "param"), [case[1:] for case in BAD_CHAT], ids=[case[0] for case in BAD_CHAT])
def test_bad_chat_requests(api: Api, fields: dict[str, Any], param: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.call(
            lambda c: c.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, "stream": stream, **fields})
        )
    error = caught.value
    assert (error.status_code, error.type, error.param) == (400, "invalid_request_error", param)
    assert len(error.message) > 20


def test_stream_options_are_for_streams(api: Api) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat("Hi", stream_options={"include_usage": True})
    assert caught.value.param == "stream_options"


def test_did_you_mean(api: Api) -> None:
    with pytest.raises(openai.BadRequestError, match="did you mean 'temperature'") as caught:
        api.chat("Hi", extra_body={"temprature": 1})
    assert caught.value.code == "unknown_parameter"


@pytest.mark.parametrize("stream", [False, True])
def test_bad_schemas_are_the_clients_fault(api: Api, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match="schema"):
        api.call(
            lambda c: c.chat.completions.create(
                model=MODEL, messages=MESSAGES, response_format=SCHEMA_FORMAT, stream=stream
            )
        )


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context(api: Api, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match="4096") as caught:
        api.chat("word " * 6000, stream=stream)
    assert caught.value.code == "context_length_exceeded"


def test_an_unknown_model(api: Api) -> None:
    for call in (
        lambda c: c.chat.completions.create(model="gpt-4o", messages=MESSAGES),
        lambda c: c.completions.create(model="gpt-4o", prompt="Hi"),
        lambda c: c.embeddings.create(model="gpt-4o", input="Hi"),
        lambda c: c.models.retrieve("gpt-4o"),
    ):
        with pytest.raises(openai.NotFoundError, match=MODEL) as caught:
            api.call(call)
        assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [99999999]}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 1, "n": 2}, "best_of"),
        ({"prompt": "a", "best_of": 3, "stream": True}, "best_of"),
        ({"prompt": "a", "logprobs": 100}, "logprobs"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ],
)
def test_bad_completion_requests(api: Api, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.call(lambda c: c.completions.create(model=MODEL, **fields))
    assert caught.value.param == param


RAW: list[tuple[str, bytes, str, int, str]] = [
    ("not JSON", b"{", "application/json", 400, "invalid_json"),
    ("empty", b"", "application/json", 400, "invalid_json"),
    ("not UTF-8", b'{"model": "\xff"}', "application/json", 400, "invalid_json"),
    ("NaN", b'{"model": "tiny", "messages": [], "temperature": NaN}', "application/json", 400, "invalid_json"),
    ("a list", b"[]", "application/json", 400, "invalid_type"),
    ("nested deeply", b'{"chat_template_kwargs": ' + b'{"a": ' * 100_000, "application/json", 400, "invalid_json"),
    (
        "an endless number",
        b'{"model": "tiny", "messages": [], "top_p": 1e999}',
        "application/json",
        400,
        "invalid_value",
    ),
    ("no model", b'{"messages": []}', "application/json", 400, "missing_required_parameter"),
    ("a form", b"model=tiny", "application/x-www-form-urlencoded", 400, "unsupported_content_type"),
]


@pytest.mark.parametrize("case", RAW, ids=[case[0] for case in RAW])
def test_bodies_that_are_no_requests(server: Server, case: tuple[str, bytes, str, int, str]) -> None:
    _, body, content_type, status, code = case
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", content=body, headers={"content-type": content_type}, timeout=30
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    assert set(error) == {"message", "type", "param", "code"}


def test_a_body_beyond_the_limit(server: Server) -> None:
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        content=b" " * (33 << 20),
        headers={"content-type": "application/json"},
        timeout=60,
    )
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


def test_wrong_methods_and_paths(server: Server) -> None:
    answer = httpx.get(f"{server.url}/v1/chat/completions")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    answer = httpx.get(f"{server.url}/v1/nothing")
    assert answer.status_code == 404
    assert "/v1/nothing" in answer.json()["error"]["message"]


def test_a_deadline_that_passes(api: Api) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        api.chat("Tell me a story.", max_tokens=3000, extra_body={"timeout": 0.05, "ignore_eos": True})
    assert caught.value.status_code == 504
    with pytest.raises(openai.APIError, match="deadline"):
        api.chat_events("Tell me a story.", max_tokens=3000, extra_body={"timeout": 0.3, "ignore_eos": True})
