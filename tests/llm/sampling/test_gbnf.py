"""GBNF grammars mean what llama.cpp's notation says."""

from __future__ import annotations

import pytest

from tests.llm.sampling.guided import accepts
from trine.core.errors import RequestError
from trine.llm.sampling.gbnf import gbnf_to_lark, is_gbnf
from trine.llm.sampling.params import GuidedParams

CASES = [
    ('root ::= "a" | "b"+', ["a", "bbb"], ["ab", ""]),
    ('root ::= [a-z]+ "z"', ["abz", "zz"], ["z", "ab"]),  # no lexer: the letters leave the z to the string
    ('root ::= "if" | [a-z]+ "!"', ["if", "ifx!", "if!"], ["ifx"]),
    ('root ::= "a"{2} "b"{1,2} "c"{2,} "d"{,1}', ["aabcc", "aabbcccd"], ["abcc", "aabbbcc", "aabc"]),
    ('root ::= [^"\\\\\\]^-]', ["a", "é", "["], ['"', "\\", "]", "^", "-"]),
    ("root ::= [a\\-z_.$-]+", ["a-z", "$.-"], ["b"]),
    ('root ::= "\\u00e9\\x41\\U0001F600\\t\\"\\\\"', ['éA😀\t"\\'], ["e"]),
    ("root ::= . .", ["ab", "é\n"], ["a", "abc"]),
    ('root ::= "" | "x" root', ["", "xxx"], ["y"]),
    ('root ::= (\n  "a" |\n  "b"\n)* # comment\n  "c"\nunused ::= "z"', ["c", "abac"], ["a", "z"]),
    ('root ::= list\nlist ::= "[" (item ("," item)*)? "]"\nitem ::= list | [0-9]', ["[]", "[1,[2,[]]]"], ["[1,]", "["]),
    ('start ::= foo-bar\nfoo-bar ::= "x"', ["x"], ["y"]),
    ('root ::= "/" [/]', ["//"], ["/"]),
]


@pytest.mark.parametrize(("grammar", "valid", "invalid"), CASES)
def test_grammars(grammar: str, valid: list[str], invalid: list[str]) -> None:
    guided = GuidedParams(grammar=grammar)
    assert [text for text in valid if not accepts(guided, text)] == []
    assert [text for text in invalid if accepts(guided, text)] == []


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('root ::= "a" )', "line 1: ')' is not expected"),
        ('root ::= ("a"', "')' is expected"),
        ('root ::= "a"\nroot ::= "b"', "line 2: rule root is defined twice"),
        ('\n\nroot ::= "\\q"', "line 3: \\\\q is no escape"),
        ('root ::= "\\u12"', "4 hexadecimal digits"),
        ("root ::= []", "matches nothing"),
        ("root ::= [a", "not closed"),
        ('root ::= "a"{3,2}', "ends before it begins"),
        ('root ::= "a"{x}', "a repetition is"),
        ("root ::= *", "not expected"),
    ],
)
def test_errors_name_the_line(grammar: str, message: str) -> None:
    with pytest.raises(RequestError, match=message.replace("(", r"\(").replace(")", r"\)")):
        gbnf_to_lark(grammar)


def test_lark_is_told_from_gbnf() -> None:
    assert is_gbnf('# note\nroot ::= "a"')
    assert not is_gbnf('start: "x ::= y"')
