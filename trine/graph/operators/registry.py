"""The table of operators: what each computes, as one plain function on tensors.

The function is the operator's specification. Positional parameters are its inputs (one with a default may be left out,
`*rest` takes any number), keyword-only ones its attributes with their defaults, and an attribute that has no parameter
is refused when a model is imported. `_outputs`, where it is there, is the number of outputs asked for. A subgraph
arrives as a function of its inputs. Tensors are torch's, on a CPU; strings NumPy object arrays; sequences lists.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
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
    attributes: frozenset[str]
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
        attributes=frozenset(p.name for p in keywords if not p.name.startswith("_")),
        required=frozenset(p.name for p in keywords if p.default is p.empty and not p.name.startswith("_")),
        counts_outputs=any(p.name == "_outputs" for p in keywords),
        pure=pure,
    )


def find(op: str, node: str) -> Operator:
    """The operator `op`, or UnsupportedOperatorError naming `node`."""
    try:
        return OPERATORS[op]
    except KeyError:
        raise UnsupportedOperatorError(op, node, "is not supported: replace it in the model") from None


def check(op: str, node: str, inputs: int, attributes: dict[str, Any]) -> Operator:
    """That `op` exists and takes these many inputs and these attributes; UnsupportedOperatorError otherwise."""
    found = find(op, node)
    unknown = sorted(set(attributes) - found.attributes)
    if unknown:
        raise UnsupportedOperatorError(op, node, f"has no attribute {unknown[0]!r} that Trine knows")
    missing = sorted(found.required - set(attributes))
    if missing:
        raise UnsupportedOperatorError(op, node, f"needs the attribute {missing[0]!r}")
    if inputs < found.minimum or (found.maximum is not None and inputs > found.maximum):
        most = "any number" if found.maximum is None else found.maximum
        raise UnsupportedOperatorError(op, node, f"has {inputs} inputs, it takes {found.minimum} to {most}")
    return found
