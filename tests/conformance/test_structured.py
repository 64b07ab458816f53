"""Answers in a format: response_format and its extensions, guided_* and nvext, `.parse`."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import jsonschema
import pydantic
import pytest

from tests.conformance.harness import MODEL, Api, text_of

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TEXT = "Extract: Ann is 31 years old."


def test_json_schema(api: Api) -> None:
    response_format = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    answer = api.chat(TEXT, response_format=response_format, max_tokens=200, temperature=1, seed=3)
    jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)
    assert answer.choices[0].finish_reason == "stop"
    chunks = api.chat_events(TEXT, response_format=response_format, max_tokens=200, temperature=1, seed=3)
    assert text_of(chunks) == answer.choices[0].message.content


def test_json_object(api: Api) -> None:
    answer = api.chat(TEXT + " Answer in JSON.", response_format={"type": "json_object"}, max_tokens=400)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    assert answer.choices[0].message.content.lstrip().startswith("{")


def test_text_is_free(api: Api) -> None:
    plain = api.chat(TEXT).choices[0].message.content
    assert api.chat(TEXT, response_format={"type": "text"}).choices[0].message.content == plain


def test_parse(api: Api) -> None:
    class Person(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=12)
        age: int = pydantic.Field(ge=0, le=150)
        mood: Literal["good", "bad"]

    completion = api.call(
        lambda client: client.chat.completions.parse(
            model=MODEL, messages=[{"role": "user", "content": TEXT}], response_format=Person, temperature=0
        )
    )
    assert isinstance(completion.choices[0].message.parsed, Person)
    _, final = api.helper(
        lambda client: client.chat.completions.stream(
            model=MODEL, messages=[{"role": "user", "content": TEXT}], response_format=Person, temperature=0
        )
    )
    assert final.choices[0].message.parsed == completion.choices[0].message.parsed


GUIDED: list[tuple[dict[str, Any], str]] = [
    ({"guided_regex": r"[ab]{3}-\d{2}"}, r"[ab]{3}-\d{2}"),
    ({"guided_choice": ["positive", "negative"]}, "positive|negative"),
    ({"guided_grammar": 'root ::= "x" [0-9] "y"'}, r"x\dy"),
    ({"guided_json": {"type": "integer", "minimum": 10, "maximum": 99}}, r"\d\d"),
    ({"nvext": {"guided_regex": "[cd]{2}"}}, "[cd]{2}"),
    ({"nvext": {"guided_choice": ["one", "two"]}}, "one|two"),
    ({"response_format": {"type": "regex", "regex": "[ef]{4}"}}, "[ef]{4}"),
    ({"response_format": {"type": "ebnf", "ebnf": 'root ::= "p" | "q"'}}, "p|q"),
]


@pytest.mark.parametrize(("fields", "pattern"), GUIDED, ids=lambda value: str(value)[:40])
def test_guided(api: Api, fields: dict[str, Any], pattern: str) -> None:
    text = api.chat(TEXT, temperature=1, seed=1, extra_body=fields).choices[0].message.content
    assert re.fullmatch(pattern, text.strip()), text
    text = api.complete("It is", temperature=1, seed=1, max_tokens=32, extra_body=fields).choices[0].text
    assert re.fullmatch(pattern, text.strip()), text


def test_a_schema_as_text(api: Api) -> None:
    answer = api.chat(TEXT, max_tokens=200, extra_body={"guided_json": json.dumps(SCHEMA)})
    jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)
