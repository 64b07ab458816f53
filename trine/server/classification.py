"""The classification extension: an output's largest values, as strings `value:index[:label]`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from trine.server.errors import ServerError
from trine.server.tensors import Tensor

_SUPPORTED = frozenset(("UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP32", "FP64"))


def classify(tensor: Tensor, count: int, labels: Sequence[str], *, batched: bool) -> Tensor:
    """The `count` largest of each row (of all values where the model does not batch), largest first.

    Of equal values the first comes first. ServerError for datatypes that have no order.
    """
    if tensor.datatype not in _SUPPORTED:
        raise ServerError(f"class result not available for output due to unsupported type '{tensor.datatype}'")
    values = tensor.array
    rows = values.reshape(values.shape[0], math.prod(values.shape[1:])) if batched else values.reshape(1, -1)
    count = min(count, rows.shape[1])
    # The stable order of the negated ranks, so that no value overflows on being negated.
    order = rows.shape[1] - 1 - np.argsort(rows[:, ::-1], axis=1, kind="stable")[:, ::-1][:, :count]
    texts = [[_text(row[index], int(index), labels) for index in best] for row, best in zip(rows, order, strict=True)]
    array = np.empty((len(texts), count), dtype=object)
    for index, row in enumerate(texts):
        array[index] = row
    return Tensor(
        tensor.name, "BYTES", array.shape if batched else array.shape[1:], array.reshape(array.shape if batched else -1)
    )


def labels_of(repository: Any, model: Any, output: str) -> list[str]:
    """The class names of an output; of an ensemble's, if it has none, those of the member that makes it."""
    labels: list[str] = model.labels(output)
    if labels or not model.config.HasField("ensemble_scheduling"):
        return labels
    for step in model.config.ensemble_scheduling.step:
        for name, tensor in step.output_map.items():
            if tensor == output:
                version = str(step.model_version) if step.model_version > 0 else ""
                return labels_of(repository, repository.model(step.model_name, version), name)
    return labels


def _text(value: np.generic, index: int, labels: Sequence[str]) -> bytes:
    number = f"{float(value):f}" if isinstance(value, np.floating) else str(value)
    label = labels[index] if index < len(labels) else ""
    return (f"{number}:{index}:{label}" if label else f"{number}:{index}").encode()
