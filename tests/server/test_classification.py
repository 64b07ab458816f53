"""The classification extension against a slow and obvious twin."""

from __future__ import annotations

import numpy as np
import pytest

from trine.server.classification import classify
from trine.server.errors import ServerError
from trine.server.tensors import Tensor


def expected(row: np.ndarray, count: int, labels: list[str]) -> list[bytes]:
    order = sorted(range(len(row)), key=lambda index: (-float(row[index]), index))[:count]
    texts = []
    for index in order:
        number = f"{float(row[index]):f}" if row.dtype.kind == "f" else str(row[index])
        texts.append(f"{number}:{index}" + (f":{labels[index]}" if index < len(labels) and labels[index] else ""))
    return [text.encode() for text in texts]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("count", [1, 3, 50])
@pytest.mark.parametrize("shape", [(1, 10), (4, 7), (3, 2, 5)])
def test_rows(dtype: type, count: int, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(count).integers(0, 5, shape).astype(dtype)
    labels = ["a", "", "c"]
    flat = values.reshape(shape[0], -1)
    answer = classify(Tensor.of("O", values), count, labels, batched=True)
    assert answer.array.tolist() == [expected(row, count, labels) for row in flat]
    single = classify(Tensor.of("O", values), count, labels, batched=False)
    assert single.array.tolist() == expected(values.reshape(-1), count, labels)


def test_extremes() -> None:
    values = np.array([np.iinfo(np.int64).min, np.iinfo(np.int64).max, 0])
    answer = classify(Tensor.of("O", values), 3, [], batched=False)
    assert answer.array.tolist() == [b"9223372036854775807:1", b"0:2", b"-9223372036854775808:0"]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0,)])
def test_nothing_to_classify(shape: tuple[int, ...]) -> None:
    answer = classify(Tensor.of("O", np.zeros(shape, np.float32)), 2, [], batched=len(shape) > 1)
    assert answer.size == 0


def test_datatypes_without_an_order() -> None:
    for values in (np.array([b"a"], dtype=object), np.array([True])):
        with pytest.raises(ServerError, match="unsupported type"):
            classify(Tensor.of("O", values), 1, [], batched=False)
