"""/v1/chat/completions: every field of OpenAI's that needs no tool and no format, streamed and whole."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conformance.harness import MODEL, Api, text_of

QUESTION = "What is 12 + 30?"


def test_an_answer_has_every_field(api: Api) -> None:
    answer = api.chat(QUESTION)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    assert answer.created > 1_700_000_000
    assert answer.system_fingerprint.startswith("fp_")
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "stop", "assistant")
    assert "42" in choice.message.content
    assert choice.message.tool_calls is None
    assert choice.logprobs is None
    usage = answer.usage
    assert usage.prompt_tokens > 0
    assert usage.completion_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_is_the_answer_in_parts(api: Api) -> None:
    whole = api.chat("Tell me a short story.")
    chunks = api.chat_events("Tell me a short story.")
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.role for chunk in chunks[1:]] == [None] * (len(chunks) - 1)
    assert text_of(chunks) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons[-1] == whole.choices[0].finish_reason == "length"
    assert set(reasons[:-1]) == {None}
    assert chunks[-1].choices[0].delta.content is None
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_include_usage_ends_the_stream_with_usage(api: Api) -> None:
    whole = api.chat(QUESTION)
    chunks = api.chat_events(QUESTION, stream_options={"include_usage": True})
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_cached_tokens_are_reported(api: Api) -> None:
    text = "Repeat after me. " * 40 + api.kind
    first, second = api.chat(text, max_tokens=4), api.chat(text, max_tokens=4)
    assert second.usage.prompt_tokens_details.cached_tokens >= second.usage.prompt_tokens - 32
    assert first.choices[0].message.content == second.choices[0].message.content


def test_n_choices(api: Api) -> None:
    fields: dict[str, Any] = {"n": 3, "temperature": 1.2, "seed": 5, "max_tokens": 12}
    answer = api.chat("Tell me a story.", **fields)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) > 1
    chunks = api.chat_events("Tell me a story.", **fields)
    assert [text_of(chunks, index) for index in range(3)] == texts
    roles = [c.index for chunk in chunks for c in chunk.choices if c.delta.role == "assistant"]
    assert sorted(roles) == [0, 1, 2]


def test_seed_repeats(api: Api) -> None:
    def once(seed: int) -> str:
        answer = api.chat("Tell me a story.", temperature=1.3, seed=seed, max_tokens=24)
        return str(answer.choices[0].message.content)

    assert once(1) == once(1)
    assert len({once(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_token_limits(api: Api, name: str) -> None:
    messages = [{"role": "user", "content": "Tell me a long story."}]
    fields = {"model": MODEL, "messages": messages, name: 5}
    answer = api.call(lambda client: client.chat.completions.create(**fields))
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("as_list", [False, True])
def test_stop_strings_cut_the_text(api: Api, as_list: bool) -> None:
    whole = api.chat("Tell me a story.").choices[0].message.content
    word = whole.split()[4]
    stop = [word, "\u2603"] if as_list else word
    answer = api.chat("Tell me a story.", stop=stop)
    assert answer.choices[0].message.content == whole[: whole.index(word)]
    assert answer.choices[0].finish_reason == "stop"
    chunks = api.chat_events("Tell me a story.", stop=stop)
    assert text_of(chunks) == whole[: whole.index(word)]


def test_logprobs(api: Api) -> None:
    answer = api.chat(QUESTION, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert "".join(token.token for token in content) == answer.choices[0].message.content
    for token in content:
        assert bytes(token.bytes).decode() == token.token
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # greedy
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (top.logprob for top in token.top_logprobs), reverse=True
        )
    chunks = api.chat_events(QUESTION, logprobs=True, top_logprobs=3)
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in content]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in content], abs=1e-3)


def test_logprobs_without_alternatives(api: Api) -> None:
    content = api.chat(QUESTION, logprobs=True).choices[0].logprobs.content
    assert content
    assert all(token.top_logprobs == [] for token in content)


def test_logit_bias_forces_and_forbids(api: Api, server: Any) -> None:
    import httpx

    [token] = httpx.post(f"{server.url}/tokenize", json={"prompt": "7"}).json()["tokens"]
    assert api.chat(QUESTION, logit_bias={str(token): 100}, max_tokens=3).choices[0].message.content == "777"
    plain = api.chat("What is 3 + 4?").choices[0].message.content
    assert "7" in plain
    assert "7" not in api.chat("What is 3 + 4?", logit_bias={str(token): -100}).choices[0].message.content


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_penalties_change_the_answer(api: Api, penalty: str) -> None:
    plain = api.chat("Tell me a long story.", max_tokens=80).choices[0].message.content
    assert api.chat("Tell me a long story.", max_tokens=80, **{penalty: 2.0}).choices[0].message.content != plain
    assert api.chat("Tell me a long story.", max_tokens=80, **{penalty: 0.0}).choices[0].message.content == plain


def test_top_p_of_almost_nothing_is_greedy(api: Api) -> None:
    greedy = api.chat("Tell me a story.").choices[0].message.content
    assert api.chat("Tell me a story.", temperature=1.0, top_p=1e-6).choices[0].message.content == greedy


def test_accepted_without_effect(api: Api) -> None:
    answer = api.chat(
        QUESTION,
        store=False,
        metadata={"purpose": "test"},
        user="somebody",
        service_tier="auto",
        reasoning_effort="low",
        verbosity="low",
        prompt_cache_key="k",
        safety_identifier="s",
        modalities=["text"],
        prediction={"type": "content", "content": "42"},
    )
    assert "42" in answer.choices[0].message.content
    assert answer.service_tier == "default"
    assert answer.metadata == {"purpose": "test"}


def test_null_means_the_default(api: Api) -> None:
    answer = api.chat(
        QUESTION, stop=None, n=None, logprobs=None, presence_penalty=None, seed=None, logit_bias=None, top_p=None
    )
    assert "42" in answer.choices[0].message.content


def test_message_roles_and_parts(api: Api) -> None:
    messages = [
        {"role": "developer", "content": "Answer with a number."},
        {"role": "user", "content": [{"type": "text", "text": "What is 1 + 1?"}], "name": "ann"},
        {"role": "assistant", "content": [{"type": "text", "text": "2"}]},
        {"role": "user", "content": QUESTION},
    ]
    answer = api.chat(None, messages=messages)
    assert answer.choices[0].message.content
    assert answer.usage.prompt_tokens > api.chat(QUESTION).usage.prompt_tokens


def test_a_message_can_be_sent_back_as_it_came(api: Api) -> None:
    first = api.chat(QUESTION)
    messages = [
        {"role": "user", "content": QUESTION},
        first.choices[0].message.model_dump(),
        {"role": "user", "content": "And 1 more?"},
    ]
    assert api.chat(None, messages=messages).choices[0].finish_reason in ("stop", "length")


def test_raw_response_headers(api: Api) -> None:
    raw = api.call(
        lambda client: client.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=[{"role": "user", "content": QUESTION}],
            extra_headers={"x-request-id": "my-id-1"},
        )
    )
    assert raw.headers["x-request-id"] == "my-id-1"
    assert int(raw.headers["openai-processing-ms"]) >= 0
    for kind in ("requests", "tokens"):
        assert int(raw.headers[f"x-ratelimit-limit-{kind}"]) >= int(raw.headers[f"x-ratelimit-remaining-{kind}"])
        assert raw.headers[f"x-ratelimit-reset-{kind}"].endswith("s")
    assert raw.parse().choices


def test_stream_helper(api: Api) -> None:
    events, final = api.helper(
        lambda client: client.chat.completions.stream(
            model=MODEL, messages=[{"role": "user", "content": QUESTION}], temperature=0
        )
    )
    kinds = {event.type for event in events}
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == api.chat(QUESTION).choices[0].message.content
