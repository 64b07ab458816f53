"""Random JSON schemas, random logits, temperature 1: every output parses and validates."""

from __future__ import annotations

import json
import random
import re

import jsonschema
import pytest

from tests.llm.sampling.guided import compiler, tokenizer, write
from tests.llm.sampling.schemas import FORMATS, PATTERNS, Schema, random_schema
from trine.llm.sampling.params import GuidedParams


def check(schema: Schema, seed: int, budget: int = 600) -> None:
    guided = GuidedParams(json=schema)
    written = write(guided, seed, budget)
    assert written.finished, f"cut off: {json.dumps(schema)}\n{written.text}"
    jsonschema.Draft202012Validator(schema).validate(json.loads(written.text, parse_constant=pytest.fail))


@pytest.mark.parametrize("block", range(6))
def test_sixty_random_schemas(block: int) -> None:
    for seed in range(block * 10, block * 10 + 10):
        check(random_schema(random.Random(seed)), seed)


@pytest.mark.slow
def test_a_thousand_random_schemas() -> None:
    for seed in range(1000, 2000):
        check(random_schema(random.Random(seed)), seed)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern: str) -> None:
    for seed in range(4):
        check(
            {"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}, "required": ["a"]}, seed, 60
        )


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_writable(name: str) -> None:
    written = write(GuidedParams(json={"type": "string", "format": name}), 1, 80)
    assert written.finished
    assert json.loads(written.text)


def nested(depth: int) -> Schema:
    schema: Schema = {"type": "object", "properties": {"leaf": {"type": "integer"}}, "required": ["leaf"]}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"inner": schema, "list": {"type": "array"}}, "required": ["inner"]}
    return schema


RECURSIVE: Schema = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"value": {"type": "number"}, "next": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["value", "next"],
        }
    },
}
ENDLESS: dict[str, Schema] = {
    "any object": {"type": "object"},
    "any value": {},
    "free strings": {"type": "object", "additionalProperties": {"type": "string"}},
    "long arrays": {"type": "array", "items": {"type": "array", "items": {"type": "number"}, "minItems": 2}},
    "recursion": RECURSIVE,
    "deep": nested(6),
    "unbounded pattern": {"type": "array", "items": {"type": "string", "pattern": r"^[a-z]*q[\w ]+@(x|y)+\.com$"}},
    "multiples": {"type": "array", "items": {"type": "integer", "multipleOf": 97, "minimum": 10_000}, "minItems": 3},
}


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("spare", [60, 150, 400])
def test_texts_that_could_go_on_for_ever_end_within_the_budget(name: str, spare: int) -> None:
    """The budget is what the shortest text takes, and `spare`."""
    shortest = compiler().compile(GuidedParams(json=ENDLESS[name])).shortest
    assert shortest is not None
    for seed in range(3):
        check(ENDLESS[name], seed, shortest + spare)


def test_a_json_object_ends_within_the_budget() -> None:
    for seed in range(10):
        written = write(GuidedParams(json_object=True), seed, 200)
        assert written.finished
        assert isinstance(json.loads(written.text), dict)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "number"},
        {"type": "integer"},
        {"type": "number", "exclusiveMinimum": 0.1, "exclusiveMaximum": 0.2},
        {"type": "number", "minimum": 1.5},
        {"type": "integer", "maximum": -10},
    ],
)
def test_numbers_stay_short_and_within_exclusive_bounds(schema: Schema) -> None:
    for seed in range(15):
        written = write(GuidedParams(json={"type": "array", "items": schema, "minItems": 5, "maxItems": 5}), seed)
        values = json.loads(written.text)
        jsonschema.validate(values, {"type": "array", "items": schema})
        for text in written.text.strip("[] \n").split(","):
            digits = [char for char in text.lower().split("e")[0] if char.isdigit()]
            assert len(digits) <= 18, text
        assert all(abs(value) < 1e100 for value in values)


def test_whitespace_is_bounded() -> None:
    """A model that likes nothing better than blanks still gets on with it."""
    for seed in range(20):
        written = write(GuidedParams(json=nested(2)), seed, temperature=100.0)
        assert written.finished
        outside = re.sub(r'"(?:[^"\\]|\\.)*"', "string", written.text)
        assert max(map(len, re.findall(r"\s*", outside))) <= 17


def test_special_tokens_and_padding_are_never_part_of_the_text() -> None:
    from tests.llm.sampling.guided import PADDING, allowed, state_of

    state = state_of(GuidedParams(json={"type": "string"}))
    known = tokenizer()
    assert state.accept(known.hf.token_to_id('"'))
    inside = allowed(state)
    assert len(inside) > 1000
    assert not inside & known.special_ids
    assert max(inside) < known.vocab_size < known.vocab_size + PADDING
