"""Random JSON schemas: nested objects, enumerations, arrays, bounded numbers, patterns, formats, references."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

PATTERNS = (
    "^[a-z]{2,8}$",
    "^[A-Z][a-z]+$",
    r"^\d{3}-\d{4}$",
    r"^\d{4}-\d{2}-\d{2}$",
    "^(red|green|blue)-[0-9]+$",
    r"^[\w.]+@[a-z]+\.(com|org)$",
    r"^#[0-9a-fA-F]{6}$",
    "^[A-Z]{2,3}_[0-9]{1,4}$",
    "[0-9]",
    "^x",
    r"^(\+1)?[0-9]{10}$",
    r"^v\d+\.\d+(\.\d+)?$",
)
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")
WORDS = (
    "name",
    "id",
    "count",
    "tags",
    "city",
    "price",
    "active",
    "items",
    "größe",
    "a b",
    'quo"te',
    "back\\slash",
    "x-1",
)


def random_schema(rng: random.Random, depth: int = 3) -> Schema:
    """An object schema whose values nest up to `depth` levels."""
    schema = _object(rng, depth)
    if rng.random() < 0.2:
        schema["$defs"] = {"shared": _value(rng, 0)}
        schema["properties"]["reference"] = {"$ref": "#/$defs/shared"}
        schema["required"] = [*schema.get("required", []), "reference"]
    return schema


def _value(rng: random.Random, depth: int) -> Schema:
    makers = [_string, _integer, _number, _enum, _boolean, _const]
    if depth > 0:
        makers += [_object, _array, _array, _choice]
    return rng.choice(makers)(rng, depth)


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(WORDS, rng.randint(1, 4))
    schema: Schema = {"type": "object", "properties": {name: _value(rng, depth - 1) for name in names}}
    if rng.random() < 0.9:
        schema["required"] = rng.sample(names, rng.randint(0, len(names)))
    if rng.random() < 0.7:
        schema["additionalProperties"] = False
    elif rng.random() < 0.3:
        schema["additionalProperties"] = {"type": "integer"}
    return schema


def _array(rng: random.Random, depth: int) -> Schema:
    schema: Schema = {"type": "array", "items": _value(rng, depth - 1)}
    if rng.random() < 0.6:
        schema["minItems"] = rng.randint(0, 3)
    if rng.random() < 0.7:
        schema["maxItems"] = schema.get("minItems", 0) + rng.randint(0, 4)
    if rng.random() < 0.1:
        schema["prefixItems"] = [_value(rng, depth - 1), _value(rng, depth - 1)]
    return schema


def _choice(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_value(rng, depth - 1) for _ in range(rng.randint(2, 3))]}


def _string(rng: random.Random, depth: int) -> Schema:
    kind = rng.random()
    if kind < 0.4:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if kind < 0.5:
        return {"type": "string", "format": rng.choice(FORMATS)}
    schema: Schema = {"type": "string"}
    if kind < 0.8:
        schema["maxLength"] = rng.randint(1, 20)
    if kind > 0.7:
        schema["minLength"] = rng.randint(0, min(5, schema.get("maxLength", 5)))
    return schema


def _integer(rng: random.Random, depth: int) -> Schema:
    schema: Schema = {"type": "integer"}
    low = rng.randint(-1000, 1000)
    if rng.random() < 0.6:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.6:
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.randint(2, 5000)
    if rng.random() < 0.1:
        return {"type": "integer", "multipleOf": rng.choice([2, 5, 10]), "minimum": 0, "maximum": 1000}
    return schema


def _number(rng: random.Random, depth: int) -> Schema:
    schema: Schema = {"type": "number"}
    low = round(rng.uniform(-100, 100), rng.randint(0, 3))
    if rng.random() < 0.6:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.6:
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = round(low + rng.uniform(0.5, 50), 2)
    return schema


def _enum(rng: random.Random, depth: int) -> Schema:
    pool = ["red", "green", "blue", "", 'say "hi"', "naïve", "日本", 1, 2.5, -7, True, None]
    return {"enum": rng.sample(pool, rng.randint(1, 5))}


def _const(rng: random.Random, depth: int) -> Schema:
    return {"const": rng.choice(["fixed", 42, False, None, [1, 2], {"k": "v"}])}


def _boolean(rng: random.Random, depth: int) -> Schema:
    return {"type": rng.choice(["boolean", "null", ["boolean", "null"], ["integer", "null"]])}
