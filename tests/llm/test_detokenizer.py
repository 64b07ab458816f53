"""Incremental text equals whole text, whatever the tokens; stop strings equal a slow twin."""

from __future__ import annotations

import functools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from tests.llm.tokenizers_for_tests import CORPUS, trained
from trine.llm.detokenizer import MAX_HELD_BYTES, IncrementalDetokenizer, OutputText
from trine.llm.tokenizer import Tokenizer

EXACT = ("byte_level", "llama", "gemma", "unigram", "word_piece", "no_decoder")


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    return Tokenizer(trained(kind))


def chunks_of(ids: list[int], cuts: random.Random) -> list[list[int]]:
    chunks, start = [], 0
    while start < len(ids):
        size = cuts.choice((0, 1, 1, 1, 2, 5))
        chunks.append(ids[start : start + size])
        start += size
    return chunks


def streamed(tok: Tokenizer, ids: list[int], skip: bool, cuts: random.Random, prompt: list[int] | None = None) -> str:
    detokenizer = IncrementalDetokenizer(tok, prompt or [], skip)
    pieces = [detokenizer.push(chunk) for chunk in chunks_of(ids, cuts)]
    return "".join(pieces) + detokenizer.flush()


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), skip=st.booleans(), seed=st.integers(0, 9))
def test_random_tokens_stream_to_the_text_of_the_whole(kind: str, data: st.DataObject, skip: bool, seed: int) -> None:
    tok = tokenizer(kind)
    # Past the vocabulary too: models have more rows than tokens.
    ids = data.draw(st.lists(st.integers(0, tok.vocab_size + 2), max_size=40))
    assert streamed(tok, ids, skip, random.Random(seed)) == tok.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40), seed=st.integers(0, 9))
def test_encoded_text_streams_to_the_text_of_the_whole(kind: str, text: str, seed: int) -> None:
    tok = tokenizer(kind)
    ids = tok.encode(text)
    assert streamed(tok, ids, True, random.Random(seed)) == tok.decode(ids)


@pytest.mark.parametrize("kind", EXACT)
def test_every_kind_is_recognised_and_not_windowed(kind: str) -> None:
    assert tokenizer(kind).table.plan is not None


def test_a_decoder_that_looks_ahead_is_windowed_and_right() -> None:
    tok = tokenizer("end_of_word")
    assert tok.table.plan is None
    for text in CORPUS[:4]:
        ids = tok.encode(text)
        assert streamed(tok, ids, True, random.Random(0)) == tok.decode(ids)


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma"])
@pytest.mark.parametrize("text", ["naïve 日本語 🎉👩‍👩‍👧 안녕", "🎉" * 50, "مرحبا بالعالم"])
def test_no_piece_holds_half_a_character(kind: str, text: str) -> None:
    tok = tokenizer(kind)
    detokenizer = IncrementalDetokenizer(tok)
    pieces = [detokenizer.push([index]) for index in tok.encode(text)] + [detokenizer.flush()]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text


def test_byte_level_text_comes_with_the_token_that_completes_it() -> None:
    tok = tokenizer("byte_level")
    detokenizer = IncrementalDetokenizer(tok)
    pieces = [detokenizer.push([index]) for index in tok.encode("漢a")]
    assert pieces == ["", "", "漢", "a"]


def test_long_runs_of_byte_tokens_are_not_held_for_ever() -> None:
    tok = tokenizer("llama")
    ids = tok.encode("漢" * 200, add_special_tokens=False)
    assert len(ids) > 600
    detokenizer = IncrementalDetokenizer(tok)
    emitted = 0
    for count, index in enumerate(ids):
        emitted += len(detokenizer.push([index]).encode())
        assert count - emitted <= MAX_HELD_BYTES + 4


def test_the_space_at_the_start_is_kept_after_a_prompt() -> None:
    tok = tokenizer("llama")
    prompt, more = tok.encode("hello"), tok.encode("world", add_special_tokens=False)
    assert tok.decode(more) == "world"
    assert streamed(tok, more, True, random.Random(0), prompt) == " world"
    assert tok.decode(prompt) + " world" == tok.decode(prompt + more)
    only_special = [tok.bos_token_id or 1]
    assert streamed(tok, more, True, random.Random(0), only_special) == "world"


def test_special_tokens_are_shown_or_not() -> None:
    tok = tokenizer("byte_level")
    ids = [*tok.encode("hello"), tok.hf.token_to_id("<|im_end|>"), tok.hf.token_to_id("<tool_call>")]
    assert streamed(tok, ids, True, random.Random(0)) == "hello<tool_call>"
    assert streamed(tok, ids, False, random.Random(0)) == "hello<|im_end|><tool_call>"


# --- stop strings ---------------------------------------------------------------------------------------------------


class Letters:
    """A detokenizer of code points: a token is a character."""

    def push(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def flush(self) -> str:
        return ""


def slow_stop(chunks: list[str], allowed: list[bool], stops: list[str], include: bool) -> tuple[str, str | None]:
    """Character by character over the whole text: the first at which an allowed stop string ends, the longest one
    there.
    """
    text = ""
    for chunk, allow in zip(chunks, allowed, strict=True):
        for char in chunk:
            text += char
            ended = [stop for stop in stops if allow and text.endswith(stop)]
            if ended:
                stop = max(ended, key=len)
                return (text if include else text[: len(text) - len(stop)]), stop
    return text, None


def could_become(text: str, stops: list[str]) -> int:
    """The longest end of a text that a stop string begins with."""
    lengths = [size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
    return max(lengths, default=0)


@settings(max_examples=400, deadline=None)
@given(
    chunks=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
    disallowed=st.integers(0, 6),
)
def test_stop_strings_equal_the_slow_twin(chunks: list[str], stops: list[str], include: bool, disallowed: int) -> None:
    allowed = [index >= disallowed for index in range(len(chunks))]
    expected, expected_stop = slow_stop(chunks, allowed, stops, include)
    output = OutputText(Letters(), stops, include)  # type: ignore[arg-type]
    seen, found = "", None
    so_far = ""
    for chunk, allow in zip(chunks, allowed, strict=True):
        delta, found = output.push([ord(char) for char in chunk], allow_stop=allow)
        seen += delta
        so_far += chunk
        if found is not None:
            break
        assert len(seen) == len(so_far) - could_become(so_far, stops), (
            "holds back what may become a stop string, no more"
        )
    assert found == expected_stop
    assert seen + output.flush() == expected
    if found is not None:
        assert output.push([ord("a")]) == ("", found), "nothing follows a stop string"


def test_a_stop_string_spans_tokens_and_is_cut_exactly() -> None:
    tok = tokenizer("byte_level")
    output = OutputText(IncrementalDetokenizer(tok), ("lazy dog", "\n\n"), include_stop=False)
    pieces = []
    for index in tok.encode("over the lazy dog. More"):
        delta, stop = output.push([index])
        pieces.append(delta)
        if stop:
            break
    assert "".join(pieces) == "over the "
    assert stop == output.stop_string == "lazy dog"
    assert output.flush() == ""


def test_a_stop_string_in_held_bytes_is_found_at_the_end() -> None:
    tok = tokenizer("llama")
    output = OutputText(IncrementalDetokenizer(tok), ("🎉",), include_stop=False)
    delta, stop = output.push(tok.encode("low 🎉", add_special_tokens=False))
    assert (delta, stop) == ("low ", None)
    assert output.flush() == ""
    assert output.stop_string == "🎉"


def test_a_decoder_written_in_python_is_used_as_it_is() -> None:
    class Shout:
        def decode_chain(self, tokens: list[str]) -> list[str]:
            return [token.upper() for token in tokens]

    backend = Backend.from_str(trained("no_decoder").to_str())
    backend.decoder = decoders.Decoder.custom(Shout())
    tok = Tokenizer(backend)
    assert tok.table.plan is None
    assert streamed(tok, tok.encode("hello world"), True, random.Random(0)) == "HELLOWORLD"
