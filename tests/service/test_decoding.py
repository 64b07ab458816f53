"""Strict decoding: what is wrong is named, with what was probably meant."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trine.core.errors import RequestError
from trine.service.openai.decoding import RequestDecoder, did_you_mean
from trine.service.openai.structs.chat import ChatRequest
from trine.service.openai.structs.completions import CompletionRequest

CHAT = RequestDecoder(ChatRequest)
BASE = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def error_of(body: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        CHAT.decode(msgspec.json.encode(body))
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("extra", "param", "code", "words"),
    [
        ({"temprature": 1}, "temprature", "unknown_parameter", "did you mean 'temperature'"),
        ({"xyzzy": 1}, "xyzzy", "unknown_parameter", "remove it"),
        ({"max_new_tokens": 1}, "max_new_tokens", "unknown_parameter", "max_tokens"),
        (
            {"stream_options": {"includ_usage": True}},
            "stream_options.includ_usage",
            "unknown_parameter",
            "include_usage",
        ),
        ({"messages": [{"role": "user", "contents": "hi"}]}, "messages[0].contents", "unknown_parameter", "'content'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter", "required"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role", "missing_required_parameter", "required"),
        ({"messages": [{"role": "usr", "content": "hi"}]}, "messages[0].role", "invalid_value", "user, assistant"),
        ({"tool_choice": "always"}, "tool_choice", "invalid_value", "auto, none, required"),
        ({"n": "2"}, "n", "invalid_type", "expected int, got str"),
        ({"n": True}, "n", "invalid_type", "expected int, got bool"),
        ({"stop": 3}, "stop", "invalid_type", "str or array"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_type", "int"),
        ({"metadata": {"a": 1}}, "metadata", "invalid_type", "str"),
        ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].type", "invalid_value", "function"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value", "json_schema"),
    ],
)
def test_errors_name_the_field_and_the_remedy(extra: dict[str, object], param: str, code: str, words: str) -> None:
    error = error_of({**BASE, **extra})
    assert (error.param, error.code) == (param, code), error.message
    assert words in error.message


@pytest.mark.parametrize("body", [b"", b"{", b'{"model": "m",}', b"\xff", b'{"a": "\\ud800"}', b"nul", b"[" * 10**6])
def test_what_is_no_json(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        CHAT.decode(body)
    assert caught.value.status == 400


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(body: bytes) -> None:
    with pytest.raises(RequestError):
        CHAT.decode(body)


@given(
    st.dictionaries(
        st.sampled_from([field.encode_name for field in msgspec.structs.fields(ChatRequest)]),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=5,
    )
)
def test_any_values_are_decoded_or_refused(fields: dict[str, object]) -> None:
    try:
        decoded = CHAT.decode(msgspec.json.encode({**BASE, **fields}))
    except RequestError:
        pass
    else:
        assert isinstance(decoded, ChatRequest)


def test_numbers_may_be_whole() -> None:
    assert CHAT.decode(msgspec.json.encode({**BASE, "temperature": 1})).temperature == 1.0
    bias = CHAT.decode(msgspec.json.encode({**BASE, "logit_bias": {"17": 2}})).logit_bias
    assert bias == {17: 2.0}


def test_prompts_of_every_kind() -> None:
    decoder = RequestDecoder(CompletionRequest)
    for prompt in ("a", ["a", "b"], [1, 2], [[1], [2, 3]]):
        assert decoder.decode(msgspec.json.encode({"model": "m", "prompt": prompt})).prompt == prompt


def test_did_you_mean_is_a_remedy() -> None:
    assert did_you_mean("top-p", ["top_p", "top_k"]) == ": did you mean 'top_p'?"
    assert did_you_mean("qqq", ["top_p"]) == ": remove it"
