"""/v1/completions: every kind of prompt, echo with log-probabilities, best_of; streamed and whole."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.conformance.harness import MODEL, Api, Server


def streamed_text(chunks: list[Any], index: int = 0) -> str:
    return "".join(choice.text for chunk in chunks for choice in chunk.choices if choice.index == index)


def tokens_of(server: Server, text: str) -> list[int]:
    tokens: list[int] = httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"]
    return tokens


def test_an_answer_has_every_field(api: Api) -> None:
    answer = api.complete()
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", MODEL)
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert choice.text
    assert answer.usage.completion_tokens == 8


def test_a_stream_is_the_answer_in_parts(api: Api) -> None:
    whole = api.complete(max_tokens=24)
    chunks = api.complete_events(max_tokens=24, stream_options={"include_usage": True})
    assert streamed_text(chunks) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_sixteen_tokens_by_default(api: Api) -> None:
    answer = api.call(lambda client: client.completions.create(model=MODEL, prompt="Once upon a time"))
    assert answer.usage.completion_tokens <= 16


def test_kinds_of_prompts(api: Api, server: Server) -> None:
    text = "Once upon a time"
    ids = tokens_of(server, text)
    wanted = api.complete(text).choices[0].text
    assert api.complete(ids).choices[0].text == wanted
    many = api.complete([text, "The sea is"])
    assert [choice.index for choice in many.choices] == [0, 1]
    assert many.choices[0].text == wanted
    assert many.choices[1].text == api.complete("The sea is").choices[0].text
    assert [choice.text for choice in api.complete([ids, ids]).choices] == [wanted, wanted]
    assert many.usage.completion_tokens == 16


def test_many_prompts_stream_side_by_side(api: Api) -> None:
    prompts = ["Once upon a time", "The sea is", "One day"]
    whole = api.complete(prompts, n=2, temperature=1, seed=3)
    chunks = api.complete_events(prompts, n=2, temperature=1, seed=3)
    assert [streamed_text(chunks, index) for index in range(6)] == [choice.text for choice in whole.choices]
    ended = [c.index for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert sorted(ended) == list(range(6))


def test_echo(api: Api) -> None:
    plain = api.complete("One day")
    echoed = api.complete("One day", echo=True)
    assert echoed.choices[0].text == "One day" + plain.choices[0].text
    assert streamed_text(api.complete_events("One day", echo=True)) == echoed.choices[0].text


def test_logprobs(api: Api) -> None:
    choice = api.complete("One day", logprobs=3).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 8
    assert all(len(top) == 3 for top in logprobs.top_logprobs)
    position = 0
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert offset == position
        position += len(token)


def test_echo_with_logprobs_scores_the_prompt(api: Api, server: Server) -> None:
    """What evaluation harnesses do: score a text, generating nothing."""
    text = "Once upon a time there was a king."
    choice = api.complete(text, echo=True, max_tokens=0, logprobs=1).choices[0]
    ids = tokens_of(server, text)
    assert choice.text == text
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == len(ids)
    assert "".join(logprobs.tokens) == text
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    for token, value, top in list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True))[
        1:
    ]:
        assert top[token] == pytest.approx(value)
        assert max(top.values()) >= value
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert text[offset:].startswith(token)


def test_the_prompts_scores_are_those_of_generating_it(api: Api) -> None:
    generated = api.complete("One day", logprobs=0, max_tokens=12).choices[0]
    scored = api.complete("One day" + generated.text, echo=True, max_tokens=1, logprobs=0).choices[0]
    start = len(scored.logprobs.tokens) - 1 - 12
    assert scored.logprobs.tokens[start:-1] == generated.logprobs.tokens
    assert scored.logprobs.token_logprobs[start:-1] == pytest.approx(generated.logprobs.token_logprobs, abs=0.05)


def test_echo_and_logprobs_stream(api: Api) -> None:
    whole = api.complete("One day", echo=True, logprobs=2).choices[0]
    chunks = api.complete_events("One day", echo=True, logprobs=2)
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices and chunk.choices[0].logprobs]
    assert [token for part in parts for token in part.tokens] == whole.logprobs.tokens
    assert [offset for part in parts for offset in part.text_offset] == whole.logprobs.text_offset


def test_best_of_returns_the_best(api: Api) -> None:
    fields = {"temperature": 1.0, "seed": 9, "logprobs": 0}

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    every = api.complete(n=4, **fields).choices
    best = api.complete(best_of=4, n=1, **fields).choices
    assert len(best) == 1
    assert mean(best[0]) == pytest.approx(max(map(mean, every)), abs=1e-3)


def test_stop_and_seed_and_penalties(api: Api) -> None:
    text = api.complete(max_tokens=16).choices[0].text
    word = text.split()[2]
    stopped = api.complete(max_tokens=16, stop=[word]).choices[0]
    assert stopped.text == text[: text.index(word)]
    assert stopped.finish_reason == "stop"
    once, again = (api.complete(temperature=1, seed=4, presence_penalty=0.5).choices[0].text for _ in range(2))
    assert once == again
