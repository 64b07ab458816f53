"""JSON schemas made ready for the grammar library: a keyword is enforced, is an annotation, or is refused by name."""

from __future__ import annotations

import json
from typing import Any

from trine.core.errors import RequestError

Schema = dict[str, Any]

_SUBSCHEMA = {"additionalProperties", "additionalItems", "items"}
_SUBSCHEMA_LISTS = {"allOf", "anyOf", "oneOf", "prefixItems"}
_SUBSCHEMA_MAPS = {"properties", "patternProperties", "$defs", "definitions"}
_ASSERTIONS = {"$ref", "const", "enum", "type", "required", "format", "pattern", "multipleOf", "minimum", "maximum"} | {
    f"{bound}{what}" for bound in ("min", "max") for what in ("Items", "Length", "Properties")
}
_ENFORCED = _SUBSCHEMA | _SUBSCHEMA_LISTS | _SUBSCHEMA_MAPS | _ASSERTIONS | {"exclusiveMinimum", "exclusiveMaximum"}
_ANNOTATIONS = {
    "$schema",
    "$id",
    "id",
    "$anchor",
    "$comment",
    "title",
    "description",
    "default",
    "example",
    "examples",
} | {
    *("deprecated", "readOnly", "writeOnly", "discriminator", "externalDocs"),
    *("contentEncoding", "contentMediaType", "contentSchema"),
}
_REMEDIES = {
    "uniqueItems": "remove it and check the result, or list the possible arrays in an enum",
    "nullable": 'use {"type": [..., "null"]}',
    "not": "describe what is allowed instead",
    "if": "use anyOf with one branch a case",
    "contains": "use prefixItems for elements at known places",
    "dependentRequired": "use anyOf with one branch a case",
    "propertyNames": "use patternProperties with additionalProperties false",
}
_MAX_DEPTH = 200


def prepare_schema(source: Schema | str | bool) -> Schema:
    """The schema as the grammar library takes it. Raises RequestError, naming the keyword and where it stands.

    An object schema that lists properties and does not mention additional ones allows only those: JSON schema's
    default, any further property with any value, is hardly ever meant, and a model would have to resist it. A `oneOf`
    whose branches are told apart by a constant property becomes `anyOf`, which is then the same.
    """
    if isinstance(source, str):
        try:
            source = json.loads(source)
        except ValueError as error:
            raise RequestError(f"JSON schema is not valid JSON: {error}", param="guided_json") from error
    if source is True:
        return {}
    if not isinstance(source, dict):
        raise RequestError(
            f"JSON schema must be an object, not {json.dumps(source)}: there is nothing it allows", param="guided_json"
        )
    schema = {key: value for key, value in source.items() if key != "x-guidance"}  # the library's own switches
    walker = _Walker(schema)
    prepared: Schema = walker.check(schema, "#", 0)
    return prepared if walker.merges else _close_objects(prepared)


class _Walker:
    """Checks and rewrites one schema. `merges` tells whether any node is the intersection of several."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self.merges = False

    def check(self, node: Any, path: str, depth: int) -> Any:
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            raise _refusal(f"the schema at {path} must be an object or a boolean, not {json.dumps(node)[:80]}")
        if depth > _MAX_DEPTH:
            raise _refusal(f"it nests more than {_MAX_DEPTH} levels deep, at {path[:80]}…")
        result: Schema = {}
        for key, value in node.items():
            if key in ("uniqueItems", "nullable") and value is False:
                continue
            if key not in _ENFORCED and key not in _ANNOTATIONS and not key.startswith("x-"):
                remedy = _REMEDIES.get(key, "remove it, or name it x-… if it is only a note")
                raise _refusal(f"the keyword {key!r} at {path} can't be enforced: {remedy}")
            result[key] = self._check_value(key, value, f"{path}/{key}", depth + 1)
        if isinstance(result.get("oneOf"), list) and self._told_apart(node["oneOf"]):
            result["anyOf" if "anyOf" not in result else "oneOf"] = result.pop("oneOf")
        if "multipleOf" in result:
            _bound_multiples(result)
        self._note_merges(result)
        _check_property_count(result, path)
        return result

    def _check_value(self, key: str, value: Any, path: str, depth: int) -> Any:
        if key in _SUBSCHEMA_MAPS and isinstance(value, dict):
            return {name: self.check(part, f"{path}/{name}", depth) for name, part in value.items()}
        if (key in _SUBSCHEMA_LISTS or key == "items") and isinstance(value, list):
            return [self.check(part, f"{path}/{index}", depth) for index, part in enumerate(value)]
        if key in _SUBSCHEMA:
            return self.check(value, path, depth)
        return value

    def _note_merges(self, node: Schema) -> None:
        parts = [key for key in ("$ref", "allOf", "anyOf", "oneOf") if key in node]
        own = any(key in node for key in ("properties", "required", "additionalProperties", "patternProperties"))
        self.merges |= "allOf" in node or len(parts) + own > 1

    def _told_apart(self, branches: list[Any]) -> bool:
        """Whether some property is required by all branches and constant in each, with values that never meet."""
        nodes = [self._resolve(branch) for branch in branches]
        if not all(isinstance(node, dict) and node.get("type") == "object" for node in nodes):
            return False
        for name in nodes[0].get("required", ()):
            values: list[Any] = []
            for node in nodes:
                part = node.get("properties", {}).get(name)
                if name not in node.get("required", ()) or not isinstance(part, dict):
                    break
                values += [part["const"]] if "const" in part else part.get("enum", [])
                if "const" not in part and "enum" not in part:
                    break
            else:
                # Strings only: 1, 1.0 and true are equal in Python and need not be in JSON.
                if all(isinstance(value, str) for value in values) and len(set(values)) == len(values):
                    return True
        return False

    def _resolve(self, node: Any) -> Any:
        """The target of a reference within the document; the node itself where it is none."""
        for _ in range(10):
            if not (isinstance(node, dict) and str(node.get("$ref", "")).startswith("#/")):
                return node
            target: Any = self._root
            for part in node["$ref"][2:].split("/"):
                target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
            node = target
        return node


def _bound_multiples(node: Schema) -> None:
    """Bounds, where there are none, that keep multiples to the digits of a double: not every number can end as one."""
    if "minimum" not in node and "exclusiveMinimum" not in node:
        node["minimum"] = -(10**15)
    if "maximum" not in node and "exclusiveMaximum" not in node:
        node["maximum"] = 10**15


def _check_property_count(node: Schema, path: str) -> None:
    """minProperties counts different names, and the library can't tell names of additional properties apart."""
    least = node.get("minProperties", 0)
    if not isinstance(least, int) or least <= len(set(node.get("required", ()))) + 1:
        return
    if least <= 1 or (node.get("properties") and node.get("additionalProperties") is False):
        return
    raise _refusal(
        f"the keyword 'minProperties' at {path} can't be enforced above 1 + the number of required properties: list "
        "the properties, and those that must be there in 'required'"
    )


def _close_objects(node: Any) -> Any:
    """additionalProperties false wherever properties are listed and nothing is said of others."""
    if isinstance(node, list):
        return [_close_objects(part) for part in node]
    if not isinstance(node, dict):
        return node
    closed: Schema = {}
    for key, value in node.items():
        if key in _SUBSCHEMA_MAPS and isinstance(value, dict):
            closed[key] = {name: _close_objects(part) for name, part in value.items()}
        elif key in _SUBSCHEMA or key in _SUBSCHEMA_LISTS:
            closed[key] = _close_objects(value)
        else:
            closed[key] = value
    properties = node.get("properties")
    if (
        isinstance(properties, dict)
        and properties
        and not {"additionalProperties", "patternProperties"} & node.keys()
        and set(node.get("required", ())) <= properties.keys()
        and "minProperties" not in node
    ):
        closed["additionalProperties"] = False
    return closed


def _refusal(message: str) -> RequestError:
    return RequestError(f"JSON schema: {message}", param="guided_json")
