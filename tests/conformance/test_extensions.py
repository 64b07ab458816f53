"""Fields that OpenAI's API does not have, through the client's extra_body."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.conformance.harness import MODEL, Api, text_of

STORY = "Tell me a story."


def chat(api: Api, content: str = STORY, **extra: Any) -> str:
    fields = {name: extra.pop(name) for name in ("temperature", "seed", "max_tokens", "stop") if name in extra}
    return str(api.chat(content, extra_body=extra, **fields).choices[0].message.content)


def test_narrow_sampling_is_greedy(api: Api) -> None:
    greedy = chat(api)
    assert chat(api, temperature=1.0, top_k=1) == greedy
    assert chat(api, temperature=1.0, min_p=1.0) == greedy
    assert chat(api, temperature=1.0, nvext={"top_k": 1}) == greedy


def test_repetition_penalty(api: Api) -> None:
    assert chat(api, max_tokens=80, repetition_penalty=1.5) != chat(api, max_tokens=80)


def test_min_tokens_and_ignore_eos(api: Api) -> None:
    def count(**extra: Any) -> int:
        answer = api.chat("What is 1 + 1?", max_tokens=20, extra_body=extra)
        return int(answer.usage.completion_tokens)

    assert count() < 12
    assert count(min_tokens=12) >= 12
    assert count(ignore_eos=True) == 20


def test_stop_token_ids_and_bad_words(api: Api) -> None:
    answer = api.chat(STORY, logprobs=True)
    first = answer.choices[0].message.content.split()[0]
    assert not chat(api, bad_words=[first]).startswith(first)
    assert not chat(api, bad_words=first).startswith(first)


def test_include_stop(api: Api) -> None:
    text = chat(api)
    word = text.split()[3]
    assert chat(api, stop=word, include_stop_str_in_output=True) == text[: text.index(word) + len(word)]


def test_beam_search(api: Api) -> None:
    beams = api.chat(
        STORY, n=2, max_tokens=8, extra_body={"use_beam_search": True, "best_of": 4, "length_penalty": 1.0}
    )
    assert len({choice.message.content for choice in beams.choices}) == 2
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat_events(STORY, extra_body={"use_beam_search": True})
    assert caught.value.param == "use_beam_search"
    text = api.complete(max_tokens=6, extra_body={"use_beam_search": True, "best_of": 3, "early_stopping": True})
    assert text.choices[0].text


def test_priority_and_timeout_are_taken(api: Api) -> None:
    assert chat(api, priority=-1, timeout=30.0) == chat(api)


def test_template_fields(api: Api) -> None:
    messages = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "The answer is"}]
    extra = {"add_generation_prompt": False, "continue_final_message": True}
    continued = api.chat(None, messages=messages, extra_body=extra)
    begun_anew = api.chat(None, messages=messages)
    assert continued.usage.prompt_tokens < begun_anew.usage.prompt_tokens
    template = "{{ messages[0].content }} {{ word }}"
    extra = {"chat_template": template, "chat_template_kwargs": {"word": "there was"}}
    own = api.chat("Once upon a time", max_tokens=8, extra_body=extra)
    assert own.choices[0].message.content == api.complete("Once upon a time there was").choices[0].text


def test_truncation_keeps_the_end(api: Api) -> None:
    long = "word " * 200 + "Once upon a time"
    cut = api.complete(long, extra_body={"truncate_prompt_tokens": 5})
    assert cut.usage.prompt_tokens == 5
    with pytest.raises(openai.BadRequestError):
        api.complete(long, extra_body={"truncate_prompt_tokens": 0})


def test_special_tokens_can_be_shown(api: Api) -> None:
    extra = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    text = api.chat("What is 1 + 1?", extra_body=extra).choices[0].message.content
    assert text.endswith(">")


def test_extensions_stream_too(api: Api) -> None:
    chunks = api.chat_events(STORY, temperature=1, extra_body={"top_k": 1, "min_tokens": 4})
    assert text_of(chunks) == chat(api)
    assert chunks[0].model == MODEL
