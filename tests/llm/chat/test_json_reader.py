"""The incremental reader agrees with the json module on what is JSON and where it ends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trine.llm.chat.json_reader import CallReader, Status, ValueReader

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)


def read(text: str, cuts: list[int]) -> tuple[Status, int, str]:
    """Status, consumed length and output of a reader that is fed the text in pieces."""
    reader = ValueReader()
    output, consumed, start = "", 0, 0
    for end in [*sorted(min(cut, len(text)) for cut in cuts), len(text)]:
        consumed += reader.feed(text[start:end]) if consumed == start else 0
        output += reader.take()
        start = end
    return reader.status, consumed, output


@settings(max_examples=300, deadline=None)
@given(
    value=VALUES,
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    cuts=st.lists(st.integers(0, 40), max_size=6),
)
def test_valid_json_is_read_to_its_end(value: Any, indent: int | None, ascii_only: bool, cuts: list[int]) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    status, consumed, output = read(text + ",", cuts)
    assert (status, consumed, output) == (Status.DONE, len(text), text)


@settings(max_examples=600, deadline=None)
@given(
    text=st.text('{}[]":,.-+eE01 \\ntrufalsunlx\x01', max_size=12)
    | st.tuples(VALUES, st.integers(0, 60), st.sampled_from('{}[]":,x1 ')).map(
        lambda t: json.dumps(t[0])[: t[1]] + t[2] + json.dumps(t[0])[t[1] + 1 :]
    ),
    cuts=st.lists(st.integers(0, 12), max_size=4),
)
def test_whatever_is_read_is_json_and_cuts_do_not_matter(text: str, cuts: list[int]) -> None:
    status, consumed, output = read(text, [])
    assert read(text, cuts) == (status, consumed, output)
    if status is Status.DONE:
        json.loads(output)
        if "\x01" not in text:
            assert text[:consumed] == output
    elif status is Status.FAILED and "\x01" not in text:
        with pytest.raises(ValueError, match=r"."):
            json.loads(text)


@pytest.mark.parametrize(
    "text",
    ["01 ", "1. ", "-x", "1e ", "+1", "nul ", "True", "'a'", '{"a" 1}', '{"a":1,}', "[1,]", '"\\x"', '"\\u12g', "]"],
)
def test_what_is_no_json_fails(text: str) -> None:
    assert read(text, [])[0] is Status.FAILED


def test_line_breaks_in_strings_are_escaped() -> None:
    status, _, output = read('{"code": "a\n\tb"}', [5, 12])
    assert status is Status.DONE
    assert json.loads(output) == {"code": "a\n\tb"}


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ('{"name": "f", "arguments": {"a": [1, {}]}}', "f", '{"a": [1, {}]}'),
        ('{"arguments": {"a": 1}, "name": "f"}', "f", '{"a": 1}'),
        ('{"name": "f", "parameters": {}}', "f", "{}"),
        ('{"name": "f"}', "f", "{}"),
        ('{"name": "f", "arguments": null}', "f", "{}"),
        ('{"id": 3, "type": {"x": []}, "name": "f", "arguments": "{\\"a\\": 1}"}', "f", '{"a": 1}'),
    ],
)
def test_calls(text: str, name: str, arguments: str) -> None:
    for cut in range(len(text)):
        reader = CallReader()
        assert reader.feed(text[:cut]) == cut
        output = reader.take()
        assert reader.feed(text[cut:]) == len(text) - cut
        assert (reader.status, reader.name, output + reader.take()) == (Status.DONE, name, arguments)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"arguments": {}}',
        '{"name": 3, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "text"}',
        '{"name": "f" "arguments": {}}',
        '{"arguments": {}, "name": "\\ud800"}',
        "[]",
    ],
)
def test_what_is_no_call_fails_before_it_starts(text: str) -> None:
    reader = CallReader()
    reader.feed(text)
    assert reader.status is Status.FAILED
    assert not reader.started


def test_arguments_come_as_they_are_read() -> None:
    reader = CallReader()
    pieces = []
    for char in '{"name": "f", "arguments": {"a": "bc"}}':
        reader.feed(char)
        pieces.append(reader.take())
    assert [piece for piece in pieces if piece] == list('{"a": "bc"}')
    assert CallReader(arguments_required=True).feed('{"name": "f"}') == len('{"name": "f"')
