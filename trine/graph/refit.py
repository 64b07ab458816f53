"""Other weights in a compiled graph: by name, or all of them from a model of the same architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from trine.core.errors import ConfigurationError
from trine.graph.ir import Graph, Node, Value
from trine.graph.passes.merge import parts_of


def refit_by_name(graph: Graph, weights: Mapping[str, torch.Tensor]) -> None:
    """Replace constants, keeping dtype and shape; ConfigurationError for a name the graph has not kept.

    Names are those of the model, where no pass has changed the weight (as folding a normalisation does).
    """
    known = {value.name: value for value in graph.constants()}
    parts = {name: (value, rows) for value in known.values() for name, rows in parts_of(value.name).items()}
    for name, given in weights.items():
        turned = name not in known and name not in parts and (f"{name}.T" in known or f"{name}.T" in parts)
        kept = f"{name}.T" if turned else name
        value, rows = parts.get(kept) or (known.get(kept), slice(None))
        if value is None:
            raise ConfigurationError(
                f"the plan has no weight {name!r}: a pass may have changed it; refit from a whole ONNX model instead. "
                f"It has {', '.join(sorted(known)[:8])} …"
            )
        data = given.T if turned else given
        if data.shape != value.data[rows].shape or data.dtype != value.data.dtype:
            wanted = f"{value.dtype} {list(value.data[rows].shape[:: -1 if turned else 1])}"
            raise ConfigurationError(f"weight {name!r} is {given.dtype} {list(given.shape)}; it must be {wanted}")
        joined = rows.stop is not None
        value.data = torch.cat([value.data[: rows.start], data, value.data[rows.stop :]]) if joined else data.clone()


def refit_from_graph(graph: Graph, other: Graph) -> None:
    """Take all constants of a graph that the same passes have left alike; ConfigurationError where they differ."""
    ours, theirs = list(graph.walk()), list(other.walk())
    if len(ours) != len(theirs):
        raise _differs(f"it gives {len(theirs)} layers, the plan has {len(ours)}")
    found: dict[Value, Value] = {}
    for mine, new in zip(ours, theirs, strict=True):
        if mine.op != new.op or len(mine.inputs) != len(new.inputs) or _settings(mine) != _settings(new):
            raise _differs(f"layer {mine.name!r} ({mine.op}) is {new.op} {new.name!r} there, or has other settings")
        for value, replacement in zip(mine.inputs, new.inputs, strict=True):
            if value is None or replacement is None or not (value.is_constant or replacement.is_constant):
                continue
            if not _alike(value, replacement):
                raise _differs(f"{value!r} of layer {mine.name!r} is {replacement!r} there")
            found[value] = replacement
    for value, replacement in found.items():
        value.data = replacement.data


def _settings(node: Node) -> dict[str, Any]:
    plain = {key: value for key, value in node.attributes.items() if not isinstance(value, Graph | torch.Tensor)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def _alike(value: Value, other: Value) -> bool:
    """Constants of one type and shape; whole numbers must be equal, too, since shapes follow from them."""
    if not (value.is_constant and other.is_constant) or value.dtype is not other.dtype or value.shape != other.shape:
        return False
    if isinstance(value.data, np.ndarray):
        return bool((value.data == other.data).all())
    return value.data.is_floating_point() or bool(torch.equal(value.data, other.data))


def _differs(reason: str) -> ConfigurationError:
    return ConfigurationError(f"the model is not of the plan's architecture: {reason}; build a plan of it")
