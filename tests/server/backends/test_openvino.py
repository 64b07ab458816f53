"""OpenVINO models: completion from the file, batches, errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.server.backends.served import Served, arrays, write_model
from trine.core.errors import ModelLoadError

openvino = pytest.importorskip("openvino")


def save_add_sub(file: Path, batch: int, datatype: Any = np.float32) -> None:
    ops = openvino.opset13
    left = ops.parameter([batch, 4], datatype, name="LEFT")
    right = ops.parameter([batch, 4], datatype, name="RIGHT")
    total, difference = ops.add(left, right), ops.subtract(left, right)
    model = openvino.Model([total, difference], [left, right], "add_sub")
    for port, name in zip((*model.inputs, *model.outputs), ("LEFT", "RIGHT", "SUM", "DIFF"), strict=True):
        port.get_tensor().set_names({name})
    openvino.save_model(model, str(file), compress_to_fp16=False)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models")
    save_add_sub(write_model(folder, "bare", "", {"1/keep": ""}) / "1" / "model.xml", -1)
    config = """
        backend: "openvino"
        input [
          { name: "LEFT" data_type: TYPE_INT32 dims: [ 2, 4 ] },
          { name: "RIGHT" data_type: TYPE_INT32 dims: [ 2, 4 ] }
        ]
        output { name: "DIFF" data_type: TYPE_INT32 dims: [ 2, 4 ] }
        instance_group { count: 2 }
        parameters { key: "INFERENCE_NUM_THREADS" value { string_value: "1" } }
    """
    save_add_sub(write_model(folder, "fixed", config, {"1/keep": ""}) / "1" / "model.xml", 2, np.int32)
    with Served(folder) as repository:
        yield repository


def test_a_bare_model_is_completed_and_batches(served: Served) -> None:
    config = served.repository.model("bare").config
    assert config.max_batch_size == 4
    assert [(tensor.name, list(tensor.dims)) for tensor in config.input] == [("LEFT", [4]), ("RIGHT", [4])]
    one = np.ones((1, 4), dtype=np.float32)
    asked = [served.submit("bare", {"LEFT": one * index, "RIGHT": one}) for index in range(5)]
    for index, request in enumerate(asked):
        served.run(request.finished)
        outputs = arrays(request.responses[0])
        np.testing.assert_array_equal(outputs["SUM"], one * (index + 1))
        np.testing.assert_array_equal(outputs["DIFF"], one * (index - 1))


def test_answers_stay_when_the_next_is_computed(served: Served) -> None:
    numbers = np.arange(8, dtype=np.int32).reshape(2, 4)
    first = served.ask("fixed", {"LEFT": numbers, "RIGHT": numbers * 0})["DIFF"]
    for _ in range(4):
        served.ask("fixed", {"LEFT": numbers * 0, "RIGHT": numbers})
    np.testing.assert_array_equal(first, numbers)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ('name: "LEFT" data_type: TYPE_INT32 dims: [ 4 ]', "'LEFT' is FP32 in the model file"),
        ('name: "LEFT" data_type: TYPE_FP32 dims: [ 5 ]', r"has shape \[-1, 4\] in the model file"),
        ('name: "MIDDLE" data_type: TYPE_FP32 dims: [ 4 ]', "'MIDDLE' is not in the model file"),
    ],
)
def test_a_configuration_that_contradicts_the_file_is_refused(tmp_path: Path, tensor: str, message: str) -> None:
    output = 'output { name: "SUM" data_type: TYPE_FP32 dims: [ 4 ] }'
    config = f'backend: "openvino" max_batch_size: 4 input {{ {tensor} }} {output}'
    save_add_sub(write_model(tmp_path, "wrong", config, {"1/keep": ""}) / "1" / "model.xml", -1)
    with pytest.raises(ModelLoadError, match=message), Served(tmp_path):
        pass


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "broken", "", {"1/model.xml": "<not a model"})
    with pytest.raises(ModelLoadError, match="OpenVINO can't read"), Served(tmp_path):
        pass
