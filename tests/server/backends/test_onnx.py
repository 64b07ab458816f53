"""ONNX models: completed configurations, batches, strings, ragged batches, and what is wrong with them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.server.serving import infer, model_bytes, row, scaling, scaling_model, serving, start, write_model
from trine.core.errors import ModelLoadError
from trine.server.configuration import datatype_name
from trine.server.errors import ServerError


def write(root: Path, name: str, model: bytes, config: str = "") -> Path:
    folder = write_model(root, name, config)
    (folder / "1" / "model.onnx").write_bytes(model)
    return folder


def value(name: str, kind: int, shape: list[Any] | None) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def passing(kind: int, shape: list[Any]) -> bytes:
    """y = x."""
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    return model_bytes(helper.make_graph(nodes, "g", [value("x", kind, shape)], [value("y", kind, shape)]))


async def test_a_bare_model_gets_a_configuration(tmp_path: Path) -> None:
    write(tmp_path, "batched", scaling_model(2.0))
    write(tmp_path, "single", scaling_model(2.0, batch=False))
    (tmp_path / "batched" / "config.pbtxt").unlink()
    settings = {"": {"default-max-batch-size": "7"}}
    for backend_settings, expected in (({}, 4), (settings, 7)):
        async with serving(tmp_path, backend_settings=backend_settings) as repository:
            config = repository.model("batched").config
            assert (config.name, config.backend, config.platform) == ("batched", "onnxruntime", "onnxruntime_onnx")
            assert config.max_batch_size == expected
            assert list(config.dynamic_batching.preferred_batch_size) == [expected]
            assert [(t.name, datatype_name(t.data_type), list(t.dims)) for t in config.input] == [("x", "FP32", [4])]
            assert [(t.name, datatype_name(t.data_type), list(t.dims)) for t in config.output] == [("y", "FP32", [4])]
            single = repository.model("single").config
            assert (single.max_batch_size, list(single.input[0].dims)) == (0, [4])
            assert not single.HasField("dynamic_batching")
            assert (await infer(repository, "single", {"x": np.ones(4, np.float32)}))["y"].tolist() == [2.0] * 4


async def test_batches_of_any_make_up_give_what_requests_alone_give(tmp_path: Path) -> None:
    """Joined bytes, arrays, numpy's copy for large ones, in the event loop and in a thread: all the same."""
    scaling(tmp_path, "m", {"1": 3.0}, "max_batch_size: 16 dynamic_batching { }")
    wide = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, ["n", "w"])],
        [value("y", TensorProto.FLOAT, ["n", "w"])],
    )
    write(tmp_path, "wide", model_bytes(wide), "max_batch_size: 16 dynamic_batching { }")
    generator = np.random.default_rng(1)
    async with serving(tmp_path) as repository:
        for _ in range(20):
            small = [generator.random((int(rows), 4), np.float32) for rows in generator.integers(1, 6, 12)]
            large = [generator.random((2, int(width)), np.float32) for width in generator.choice([5, 30_000], 6)]
            answers = await asyncio.gather(
                *(infer(repository, "m", {"x": array}) for array in small),
                *(infer(repository, "wide", {"x": array}) for array in large),
            )
            for array, answer in zip(small, answers[:12], strict=True):
                np.testing.assert_array_equal(answer["y"], array * np.float32(3))
            for array, answer in zip(large, answers[12:], strict=True):
                np.testing.assert_array_equal(answer["y"], -array)
        assert max(repository.model("m").statistics.batches) > 5


@pytest.mark.parametrize(
    ("kind", "array"),
    [
        (TensorProto.STRING, np.array([[b"a", "ä".encode()], [b"", b"x" * 300]], dtype=object)),
        (TensorProto.BOOL, np.array([[True, False]])),
        (TensorProto.FLOAT16, np.array([[1.5, -2]], np.float16)),
        (TensorProto.UINT8, np.array([[1, 255]], np.uint8)),
        (TensorProto.INT64, np.array([[1, -(2**62)]], np.int64)),
        (TensorProto.DOUBLE, np.array([[1e300, np.nan]])),
    ],
)
async def test_datatypes(tmp_path: Path, kind: int, array: Any) -> None:
    write(tmp_path, "m", passing(kind, ["n", 2]))
    async with serving(tmp_path) as repository:
        answers = await asyncio.gather(*(start(repository, "m", {"x": array}) for _ in range(3)))
        for answer in answers:
            tensor = answer[0].outputs[0]
            given = [item.encode() if isinstance(item, str) else item for item in tensor.array.reshape(-1)]
            assert given == list(array.reshape(-1)) or np.isnan(array.astype(float)).any()
            assert bytes(tensor.raw)  # it has a binary form
        if kind == TensorProto.STRING:
            with pytest.raises(ServerError, match="not UTF-8"):
                await infer(repository, "m", {"x": np.array([[b"\xff", b"a"]], dtype=object)})


async def test_ragged_batches_with_batch_inputs_and_a_scattered_output(tmp_path: Path) -> None:
    flat: list[Any] = ["total"]
    graph = helper.make_graph(
        [
            helper.make_node("Neg", ["x"], ["y"]),
            helper.make_node("Unsqueeze", ["count", "one"], ["counts"]),
            helper.make_node("Unsqueeze", ["ends", "one"], ["all_ends"]),
            helper.make_node("Shape", ["widest"], ["width"]),
            helper.make_node("Shape", ["count"], ["rows"]),
            helper.make_node("Expand", ["width", "rows"], ["widths_flat"]),
            helper.make_node("Unsqueeze", ["widths_flat", "one"], ["widths"]),
        ],
        "g",
        [
            value("x", TensorProto.FLOAT, flat),
            value("count", TensorProto.FLOAT, ["n"]),
            value("ends", TensorProto.INT32, ["n"]),
            value("widest", TensorProto.INT32, ["w"]),
        ],
        [
            value("y", TensorProto.FLOAT, flat),
            value("counts", TensorProto.FLOAT, ["n", 1]),
            value("all_ends", TensorProto.INT32, ["n", 1]),
            value("widths", TensorProto.INT64, ["n", 1]),
        ],
        [numpy_helper.from_array(np.int64([1]), "one")],
    )
    write(
        tmp_path,
        "m",
        model_bytes(graph),
        """max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 20000 }
        input [{ name: "x" data_type: TYPE_FP32 dims: [-1] allow_ragged_batch: true }]
        output [{ name: "y" data_type: TYPE_FP32 dims: [-1] }, { name: "counts" data_type: TYPE_FP32 dims: [1] },
                { name: "all_ends" data_type: TYPE_INT32 dims: [1] },
                { name: "widths" data_type: TYPE_INT64 dims: [1] }]
        batch_input [
          { kind: BATCH_ELEMENT_COUNT target_name: "count" data_type: TYPE_FP32 source_input: "x" },
          { kind: BATCH_ACCUMULATED_ELEMENT_COUNT target_name: "ends" data_type: TYPE_INT32 source_input: "x" },
          { kind: BATCH_MAX_ELEMENT_COUNT_AS_SHAPE target_name: "widest" data_type: TYPE_INT32 source_input: "x" }]
        batch_output [{ target_name: "y" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "x" }]""",
    )
    async with serving(tmp_path) as repository:
        widths = [3, 1, 4]
        answers = await asyncio.gather(*(infer(repository, "m", {"x": row(*[w] * w)}) for w in widths))
        for width, end, answer in zip(widths, np.cumsum(widths), answers, strict=True):
            assert answer["y"].tolist() == [[-width] * width]
            assert answer["counts"].item() == width
            assert answer["all_ends"].item() == end
            assert answer["widths"].item() == 4
        assert repository.model("m").statistics.batches.keys() == {3}


async def test_reshapes(tmp_path: Path) -> None:
    write(
        tmp_path,
        "m",
        passing(TensorProto.FLOAT, ["n"]),
        """max_batch_size: 4 input [{ name: "x" data_type: TYPE_FP32 dims: [1] reshape { shape: [] } }]
        output [{ name: "y" data_type: TYPE_FP32 dims: [1] reshape { shape: [] } }]""",
    )
    async with serving(tmp_path) as repository:
        answers = await asyncio.gather(*(infer(repository, "m", {"x": row(i)}) for i in range(3)))
        assert [answer["y"].tolist() for answer in answers] == [[[0]], [[1]], [[2]]]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            'input [{ name: "z" data_type: TYPE_FP32 dims: [4] }]',
            r"input 'z' is not in the model file, which has \['x'\]",
        ),
        (
            'input [{ name: "x" data_type: TYPE_INT8 dims: [4] }]',
            "'x' is FP32 in the model file, the configuration says INT8",
        ),
        (
            'max_batch_size: 2 input [{ name: "x" data_type: TYPE_FP32 dims: [5] }]',
            r"shape \[-1, 4\] in the model file",
        ),
        ('default_model_filename: "other.onnx"', r"there is no file .*other\.onnx"),
        ('parameters { key: "intra_op_thread_count" value { string_value: "x" } }', "is not an integer"),
    ],
)
async def test_what_does_not_match_the_file_is_refused(tmp_path: Path, config: str, message: str) -> None:
    write(tmp_path, "m", scaling_model(1.0), 'backend: "onnxruntime" ' + config)
    with pytest.raises(ModelLoadError, match=message):
        async with serving(tmp_path):
            pass


async def test_a_fixed_first_dimension_can_not_batch(tmp_path: Path) -> None:
    write(tmp_path, "m", scaling_model(1.0, batch=False), "max_batch_size: 2")
    with pytest.raises(ModelLoadError, match="set max_batch_size to 0, or export the model with a variable batch"):
        async with serving(tmp_path):
            pass


async def test_an_error_of_the_runtime_is_the_requests(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, ["n", "k"])],
        [value("y", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(np.ones((3, 2), np.float32), "w")],
    )
    write(tmp_path, "m", model_bytes(graph))
    async with serving(tmp_path) as repository:
        with pytest.raises(ServerError, match="onnx runtime error in model 'm'"):
            await infer(repository, "m", {"x": row(1, 2)})
        assert (await infer(repository, "m", {"x": row(1, 2, 3)}))["y"].tolist() == [[6, 6]]
        assert repository.model("m").statistics.failures["BACKEND"] == 1
