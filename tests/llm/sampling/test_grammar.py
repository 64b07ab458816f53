"""Grammars of every kind: what they allow, how they end, and what is refused by name."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from tests.llm.sampling.guided import accepts, allowed, compiler, state_of, tokenizer, write
from trine.core.errors import RequestError
from trine.llm.sampling.grammar import GrammarCompiler
from trine.llm.sampling.params import GuidedParams
from trine.llm.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("regex", "matches", "others"),
    [
        (r"\d{3}-[a-f]+", ["123-abc", "000-f"], ["12-a", "123-", "123-ag", "x123-a"]),
        (r"^a/b\d$", ["a/b1"], ["a/b", "za/b1"]),
        (r"(yes|no)?", ["", "yes"], ["y", "yesno"]),
        (r"[^x]{2}", ["ab", "éé", "\n\n"], ["ax", "a"]),
    ],
)
def test_a_regex_matches_the_whole_output(regex: str, matches: list[str], others: list[str]) -> None:
    guided = GuidedParams(regex=regex)
    assert [text for text in matches if not accepts(guided, text)] == []
    assert [text for text in others if accepts(guided, text)] == []
    for seed in range(20):
        written = write(guided, seed, 60)
        assert not written.finished or re.fullmatch(regex, written.text)


def test_choices_are_literal() -> None:
    choices = ("a.b", "yes/no", "", "(x)|y", "naïve 日本", "line\n", "a", 'q"uote\\')
    guided = GuidedParams(choice=choices)
    assert all(accepts(guided, text) for text in choices)
    assert not any(accepts(guided, text) for text in ("axb", "y", "x", "naive", "line"))
    assert {write(guided, seed).text for seed in range(100)} == set(choices)


ARITHMETIC = {
    "gbnf": 'root ::= expr\nexpr ::= term (op term)*  # flat\nterm ::= [0-9]+ | "(" expr ")"\nop ::= [-+*/]\n',
    "lark": 'start: expr\nexpr: term (OP term)*\nterm: /[0-9]+/ | "(" expr ")"\nOP: /[-+*\\/]/\n',
    "lark with root": 'root: term (OP term)*\nterm: /[0-9]+/ | "(" root ")"\nOP: /[-+*\\/]/\n',
}


@pytest.mark.parametrize("notation", ARITHMETIC)
def test_a_recursive_grammar(notation: str) -> None:
    guided = GuidedParams(grammar=ARITHMETIC[notation])
    for text in ("1", "12+3", "((1+2)*3)/4-5"):
        assert accepts(guided, text)
    for text in ("", "1+", "(1", "1)", "a"):
        assert not accepts(guided, text)
    finished = [written.text for seed in range(20) if (written := write(guided, seed, 50)).finished]
    assert finished
    for text in finished:
        eval(re.sub(r"\b0+(?=\d)", "", text).replace("/", "+"), {"__builtins__": {}})


def test_a_json_schema_within_a_grammar_is_completed_and_its_numbers_stay_short() -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "number"}, "t": {"type": "string"}},
        "required": ["n", "t"],
    }
    guided = GuidedParams(grammar=f'start: "<call>" arguments "</call>"\narguments: %json {json.dumps(schema)}\n')
    for seed in range(10):
        written = write(guided, seed, 80)
        assert written.finished
        values = json.loads(written.text.removeprefix("<call>").removesuffix("</call>"))
        assert values.keys() >= {"n", "t"}


def test_the_end_is_the_only_way_once_nothing_can_follow() -> None:
    state = state_of(GuidedParams(regex=r"\d{2}"))
    one = tokenizer().hf.token_to_id("1")
    assert not state.is_finished()
    assert state.accept(one)
    assert not state.is_finished()
    assert state.accept(one)
    assert state.is_finished()
    assert allowed(state) == set(tokenizer().eos_token_ids)
    assert state.accept(tokenizer().eos_token_ids[1])


def test_a_token_that_is_not_allowed_is_refused_and_nothing_follows_it() -> None:
    state = state_of(GuidedParams(regex=r"\d{2}"))
    assert not state.accept(tokenizer().hf.token_to_id("a"))
    assert allowed(state) == set()


def test_states_of_one_grammar_are_independent() -> None:
    first, second = (state_of(GuidedParams(choice=("ab", "cd"))) for _ in range(2))
    assert first.accept(tokenizer().hf.token_to_id("a"))
    assert second.accept(tokenizer().hf.token_to_id("c"))
    assert first.accept(tokenizer().hf.token_to_id("b"))
    assert second.accept(tokenizer().hf.token_to_id("d"))


def test_masks_of_narrower_and_wider_rows_agree() -> None:
    state = state_of(GuidedParams(json={"type": "string"}))
    words = -(-tokenizer().vocab_size // 32)
    exact, wide, narrow = (torch.full((size,), -1, dtype=torch.int32) for size in (words, words + 50, 3))
    for row in (exact, wide, narrow):
        state.fill_mask(row)
    assert torch.equal(wide[:words], exact)
    assert not wide[words:].any()
    assert torch.equal(narrow, exact[:3])


def test_compiled_grammars_are_kept() -> None:
    guided = {"json": {"type": "array", "items": {"type": "integer"}}}
    assert compiler().compile(GuidedParams(**guided)) is compiler().compile(GuidedParams(**guided))


JSON_CASES: list[tuple[Any, list[str], list[str]]] = [
    (True, ["1", "{}", '"x"'], []),
    ("{}", ["null"], []),
    ({"type": "integer", "nullable": False}, ["1"], ["1.5"]),
    ({"enum": ["a", 1, None]}, ['"a"', "1", "null"], ['"b"', "2"]),
    ({"type": "object", "properties": {"a": {"type": "integer"}}}, ["{}", '{"a": 1}', '{\n  "a":1}'], ['{"b":1}']),
    ({"type": "object", "properties": {"a": {}}, "additionalProperties": True}, ['{"a":1,"b":2}'], []),
    ({"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 2}]}, ["null", '"ab"'], ['"abc"']),
    (
        {"allOf": [{"properties": {"a": {"type": "null"}}}, {"properties": {"b": {}}}]},
        ['{"a":null,"b":1}'],
        ['{"a":1}'],
    ),
    ({"type": "array", "uniqueItems": False, "maxItems": 1}, ["[]", "[1]"], ["[1,2]"]),
    ({"x-note": 1, "x-guidance": {"lenient": True}, "type": "null"}, ["null"], ["1"]),
    (
        {
            "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
            "$defs": {
                name: {"type": "object", "properties": {"kind": {"const": name}}, "required": ["kind"]}
                for name in ("cat", "dog")
            },
        },
        ['{"kind":"cat"}', '{"kind": "dog"}'],
        ['{"kind":"cow"}', "{}"],
    ),
]


@pytest.mark.parametrize(("schema", "valid", "invalid"), JSON_CASES)
def test_json_schemas(schema: Any, valid: list[str], invalid: list[str]) -> None:
    guided = GuidedParams(json=schema)
    assert [text for text in valid if not accepts(guided, text)] == []
    assert [text for text in invalid if accepts(guided, text)] == []


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    ({"json": {"properties": {"a": {"items": {"not": {}}}}}}, "'not' at #/properties/a/items"),
    ({"json": {"if": {}, "then": {}}}, "'if'"),
    ({"json": {"$defs": {"x": {"maxLenght": 3}}}}, "maxLenght"),
    ({"json": {"anyOf": [{"type": "integer", "nullable": True}]}}, "nullable"),
    ({"json": {"type": "object", "dependentRequired": {"a": ["b"]}}}, "dependentRequired"),
    ({"json": {"type": "object", "minProperties": 3}}, "minProperties"),
    ({"json": {"type": "string", "format": "stardate"}}, "stardate"),
    ({"json": {"type": "string", "pattern": "(?=a)"}}, "look-around"),
    ({"json": {"type": "integer", "minimum": 3, "maximum": 2}}, "minimum"),
    ({"json": {"$ref": "https://example.com/x"}}, "example.com"),
    ({"json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "oneOf"),
    ({"json": "{oops"}, "not valid JSON"),
    ({"json": False}, "false"),
    ({"json": {"properties": {"a": 3}}}, "#/properties/a"),
    ({"regex": "a(b"}, "unclosed group"),
    ({"regex": r"(a)\1"}, "backreferences"),
    ({"grammar": "root ::= foo"}, "foo is not defined"),
    ({"grammar": 'root ::= "a'}, "line 1"),
    ({"grammar": 'a ::= "b"'}, "root"),
    ({"grammar": 'start: "a" B'}, '"B"'),
    ({"grammar": 'nothing: "a"'}, "start"),
]


@pytest.mark.parametrize(("guided", "names"), REFUSED)
def test_what_cannot_be_enforced_is_refused_by_name(guided: dict[str, Any], names: str) -> None:
    with pytest.raises(RequestError) as caught:
        compiler().compile(GuidedParams(**guided))
    assert names in caught.value.message
    assert "\n" not in caught.value.message


def test_deeply_nested_schemas_are_refused_not_fatal() -> None:
    schema: dict[str, Any] = {}
    for _ in range(400):
        schema = {"items": schema}
    with pytest.raises(RequestError, match="levels deep"):
        compiler().compile(GuidedParams(json=schema))


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(RequestError, match="end-of-sequence"):
        GrammarCompiler(Tokenizer(tokenizer().hf)).compile(GuidedParams(json_object=True))
