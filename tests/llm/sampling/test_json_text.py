"""Following a JSON text, and the tokens that keep its numbers short."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from tests.llm.sampling.guided import tokenizer
from trine.llm.sampling.json_text import JsonText, NumberLimits, Place


def after(text: str) -> JsonText:
    place = JsonText()
    place.feed(text.encode())
    return place


@pytest.mark.parametrize(
    ("text", "place", "digits"),
    [
        ("", Place.STRUCTURE, 0),
        ('{"a', Place.STRING, 0),
        ('{"a\\', Place.ESCAPE, 0),
        ('{"a\\"', Place.STRING, 0),
        ('{"12\\u0041"', Place.STRUCTURE, 0),
        ('{"a": -', Place.INTEGER, 0),
        ('{"a": -12', Place.INTEGER, 2),
        ('{"a": -12.5', Place.FRACTION, 3),
        ('{"a": 1e', Place.EXPONENT, 0),
        ('{"a": 1.5E-07', Place.EXPONENT, 2),
        ('{"a": 12,', Place.STRUCTURE, 0),
        ("[12 ", Place.STRUCTURE, 0),
        ("[true, null", Place.STRUCTURE, 0),
        ('<tool_call>\n{"n": 3', Place.INTEGER, 1),
    ],
)
def test_places(text: str, place: Place, digits: int) -> None:
    assert after(text) == JsonText(place, digits)


def test_does_not_depend_on_how_the_text_is_cut() -> None:
    rng = random.Random(0)
    text = json.dumps({"a": [1.5e-9, -20, {'q"\\': "x\n"}], "b\u20ac": 123456789, "c": None}, indent=1)
    whole = after(text)
    for _ in range(50):
        cut = rng.randrange(len(text))
        parts = JsonText()
        assert parts.feed(text[:cut].encode())
        assert parts.feed(text[cut:].encode())
        assert parts == whole


@pytest.mark.parametrize(
    ("number", "is_short"),
    [
        ("123456789012345678", True),
        ("1234567890123456789", False),
        ("-0.12345678901234", True),
        ("-0.123456789012345", False),
        ("1234567890123456.5", False),
        ("1.5e-99", True),
        ("1.5e-100", False),
        ("1234567890123456e5", False),
    ],
)
def test_lengths_of_numbers(number: str, is_short: bool) -> None:
    assert JsonText().feed(number.encode()) is is_short


def test_masks_are_what_feeding_each_token_says() -> None:
    tokens = [tokenizer().token_bytes(index) for index in range(tokenizer().vocab_size)]
    tokens += [b"12345678901234567890", b"1e123", b".00000000000000001", b"e5", b"0" * 17, b"-", b"9" * 16 + b".", b""]
    limits = NumberLimits(tokens)
    assert limits.mask(after('"x')) is None
    for text in (
        "",
        "[-",
        "[1",
        "[1234567890",
        "[123456789012345",
        "[123456789012345678",
        "[0.5",
        "[0.12345678901234",
        "[1e",
        "[1e1",
        "[1e12",
        "[1.12345678901234567",
    ):
        place = after(text)
        mask = limits.mask(place)
        assert mask is not None
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(tokens)].astype(bool)
        numeric = [bool(token) and token[:1] in b"0123456789+-.eE" for token in tokens]
        expected = [not starts or place.copy().feed(token) for starts, token in zip(numeric, tokens, strict=True)]
        assert allowed.tolist() == expected, text
