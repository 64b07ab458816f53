"""The table of operators: what each computes, as one plain function on tensors.

The function is the operator's specification. Positional parameters are its inputs (one with a default may be left out,
`*rest` takes any number), keyword-only ones its attributes with their defaults, and an attribute that has no parameter
is refused when a model is imported. `_outputs`, where it is there, is the number of outputs asked for. A subgraph
arrives as a function of its inputs. Tensors are torch's, on a CPU; strings NumPy object arrays; sequences lists.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from trine.graph.errors import UnsupportedOperatorError

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Operator:
    """A registered operator; `pure` ones give the same result every time."""

    name: str
    function: Callable[..., Any]
    minimum: int
    maximum: int | None
    attributes: dict[str, str]
    """Each attribute with its annotation: int, float, str, list[int], …; "| None" may follow."""
    required: frozenset[str]
    counts_outputs: bool
    pure: bool


OPERATORS: dict[str, Operator] = {}


def operator(*names: str, pure: bool = True) -> Callable[[Function], Function]:
    """Register the decorated function as the meaning of the operators `names`."""

    def register(function: Function) -> Function:
        for name in names:
            OPERATORS[name] = _describe(name, function, pure)
        return function

    return register


def _describe(name: str, function: Callable[..., Any], pure: bool) -> Operator:
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return Operator(
        name=name,
        function=function,
        minimum=sum(p.default is p.empty for p in positional),
        maximum=None if variadic else len(positional),
        attributes={p.name: str(p.annotation) for p in keywords if not p.name.startswith("_")},
        required=frozenset(p.name for p in keywords if p.default is p.empty and not p.name.startswith("_")),
        counts_outputs=any(p.name == "_outputs" for p in keywords),
        pure=pure,
    )


_PLAIN: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "str": (str,)}


def _is_of(wanted: str, value: Any) -> bool:
    """Whether an attribute's value is of the annotated type; annotations of other kinds (tensors, graphs) by name."""
    if wanted in _PLAIN:
        return isinstance(value, _PLAIN[wanted])
    item = wanted.removeprefix("list[").removesuffix("]")
    if wanted.startswith("list[") and item in _PLAIN:
        return isinstance(value, list) and all(isinstance(part, _PLAIN[item]) for part in value)
    if wanted == "Body":
        return type(value).__name__ == "Graph"
    return type(value).__name__ == "Tensor" if wanted == "Tensor" else True


def find(op: str, node: str) -> Operator:
    """The operator `op`, or UnsupportedOperatorError naming `node`."""
    try:
        return OPERATORS[op]
    except KeyError:
        raise UnsupportedOperatorError(op, node, "is not supported: replace it in the model") from None


def check(op: str, node: str, inputs: Sequence[object], attributes: dict[str, Any]) -> Operator:
    """That `op` exists and takes these many inputs and these attributes; UnsupportedOperatorError otherwise."""
    found = find(op, node)
    unknown = sorted(set(attributes) - set(found.attributes))
    if unknown:
        raise UnsupportedOperatorError(op, node, f"has no attribute {unknown[0]!r} that Trine knows")
    for name, value in attributes.items():
        wanted = found.attributes[name].removesuffix(" | None")
        if not _is_of(wanted, value):
            raise UnsupportedOperatorError(op, node, f"has the attribute {name!r} of another type than {wanted}")
    missing = sorted(found.required - set(attributes))
    if missing:
        raise UnsupportedOperatorError(op, node, f"needs the attribute {missing[0]!r}")
    count = len(inputs)
    if count < found.minimum or (found.maximum is not None and count > found.maximum):
        most = "any number" if found.maximum is None else found.maximum
        raise UnsupportedOperatorError(op, node, f"has {count} inputs, it takes {found.minimum} to {most}")
    if None in inputs[: found.minimum]:
        raise UnsupportedOperatorError(op, node, f"needs its input {list(inputs).index(None)}")
    return found
