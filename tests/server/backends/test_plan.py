"""Plans served: completion from the file, batches, shared weights, foreign plans, ONNX compiled when loaded."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import trine.graph as tg
from tests.server.backends.served import Served
from tests.server.serving import infer, model_bytes, scaling_model, serving, start, write_model
from trine.core.errors import ModelLoadError
from trine.graph.profiles import read_profiles
from trine.server.configuration import datatype_name
from trine.server.errors import ServerError
from trine.server.tensors import Tensor

CPU = "instance_group [ { kind: KIND_CPU count: 2 } ]"


def accelerated(name: str = "trine", **parameters: str) -> str:
    text = " ".join(f'parameters {{ key: "{key}" value: "{value}" }}' for key, value in parameters.items())
    return (
        f'optimization {{ execution_accelerators {{ cpu_execution_accelerator: [ {{ name: "{name}" {text} }} ] }} }} '
        "max_batch_size: 8 dynamic_batching { }"
    )


def write_plan(root: Path, name: str, onnx: bytes, config: str = "", **options: Any) -> Path:
    folder = write_model(root, name, config)
    tg.build(onnx, **options).save(folder / "1" / "model.plan")
    return folder


def write_onnx(root: Path, name: str, config: str, factor: float = 2.0) -> Path:
    folder = write_model(root, name, config)
    (folder / "1" / "model.onnx").write_bytes(scaling_model(factor))
    return folder


def passing(kind: int) -> bytes:
    """y = x."""
    values = [helper.make_tensor_value_info(name, kind, ["n", 2]) for name in "xy"]
    return model_bytes(helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:]))


@pytest.mark.parametrize("head", ["", 'backend: "plan"', 'backend: "tensorrt"', 'platform: "tensorrt_plan"'])
async def test_a_bare_plan_gets_a_configuration(tmp_path: Path, head: str) -> None:
    write_plan(tmp_path, "m", scaling_model(2.0), head)
    async with serving(tmp_path) as repository:
        config = repository.model("m").config
        assert config.max_batch_size == 4
        assert config.HasField("dynamic_batching")
        assert [(t.name, datatype_name(t.data_type), list(t.dims)) for t in config.input] == [("x", "FP32", [4])]
        assert [(t.name, datatype_name(t.data_type), list(t.dims)) for t in config.output] == [("y", "FP32", [4])]


async def test_requests_are_batched_over_instances_that_share_the_plan(tmp_path: Path) -> None:
    config = f"max_batch_size: 8 dynamic_batching {{ max_queue_delay_microseconds: 50000 }} {CPU}"
    write_plan(tmp_path, "m", scaling_model(3.0), config)
    async with serving(tmp_path) as repository:
        model = repository.model("m")
        arrays = [np.full((1 + index % 3, 4), index, np.float32) for index in range(24)]
        answers = await asyncio.gather(*(infer(repository, "m", {"x": array}) for array in arrays))
        for array, answer in zip(arrays, answers, strict=True):
            np.testing.assert_array_equal(answer["y"], array * 3)
        assert max(model.statistics.batches) > 3


@pytest.mark.parametrize(
    ("kind", "array"),
    [
        (TensorProto.STRING, np.array([[b"a", "ä".encode()]], dtype=object)),
        (TensorProto.BOOL, np.array([[True, False]])),
        (TensorProto.FLOAT16, np.array([[1.5, -2]], np.float16)),
        (TensorProto.UINT8, np.array([[1, 255]], np.uint8)),
        (TensorProto.INT64, np.array([[1, -(2**62)]], np.int64)),
    ],
)
async def test_datatypes(tmp_path: Path, kind: int, array: Any) -> None:
    write_plan(tmp_path, "m", passing(kind))
    async with serving(tmp_path) as repository:
        tensor = (await start(repository, "m", {"x": array}))[0].outputs[0]
        assert [item.encode() if isinstance(item, str) else item for item in tensor.array.reshape(-1)] == list(array[0])
        if kind == TensorProto.STRING:
            with pytest.raises(ServerError, match="not UTF-8"):
                await infer(repository, "m", {"x": np.array([[b"\xff", b"a"]], dtype=object)})


def test_bfloat16_travels_as_its_bits(tmp_path: Path) -> None:
    write_plan(tmp_path, "m", passing(TensorProto.BFLOAT16))
    bits = np.array([[0x3FC0, 0xC000]], np.uint16)
    with Served(tmp_path) as served:
        (response,) = served.responses("m", {"x": Tensor("x", "BF16", (1, 2), bits)})
        assert (response.outputs[0].datatype, response.outputs[0].array.tolist()) == ("BF16", bits.tolist())


async def test_a_shape_outside_the_profiles_is_the_requests_error(tmp_path: Path) -> None:
    write_plan(tmp_path, "m", scaling_model(2.0), profiles=read_profiles(["x:1x4"], [], ["x:2x4"]))
    async with serving(tmp_path) as repository:
        with pytest.raises(ServerError, match="dimension 0 is 3, it must be 1 to 2"):
            await infer(repository, "m", {"x": np.ones((3, 4), np.float32)})
        assert (await infer(repository, "m", {"x": np.ones((2, 4), np.float32)}))["y"].shape == (2, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ftrt\0\0\0\x01" + bytes(90), "an engine of TensorRT.*trine build model.onnx"),
        (b"anything", "not a Trine plan.*trine build model.onnx"),
        (b"TRINEPLN\xff\0\0\0\0\0\0\0{", "cut off: build the plan again"),
        (None, "there is no file .*model.plan: make one with `trine build"),
    ],
)
async def test_what_is_no_plan_of_ours_is_refused_with_the_remedy(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    folder = write_model(tmp_path, "m", 'platform: "tensorrt_plan"')
    if content is not None:
        (folder / "1" / "model.plan").write_bytes(content)
    with pytest.raises(ModelLoadError, match=message):
        async with serving(tmp_path):
            pass


@pytest.mark.parametrize("name", ["trine", "tensorrt"])
async def test_an_onnx_model_is_compiled_once(tmp_path: Path, name: str) -> None:
    write_onnx(tmp_path / "models", "m", accelerated(name, opt_shapes="x:8x4", max_workspace_size_bytes="1"))
    settings = {"onnxruntime": {"cache-directory": str(tmp_path / "plans")}}
    for _ in range(2):
        async with serving(tmp_path / "models", backend_settings=settings) as repository:
            assert (await infer(repository, "m", {"x": np.ones((3, 4), np.float32)}))["y"].tolist() == [[2.0] * 4] * 3
        (made,) = (tmp_path / "plans").glob("*.plan")
        written = made.stat().st_mtime_ns
    assert made.stat().st_mtime_ns == written
    made.write_bytes(made.read_bytes()[:40])  # damaged: made again
    async with serving(tmp_path / "models", backend_settings=settings) as repository:
        await infer(repository, "m", {"x": np.ones((1, 4), np.float32)})
    tg.load_plan(made)
    (tmp_path / "models" / "m" / "1" / "model.onnx").write_bytes(scaling_model(5.0))  # another model, another plan
    async with serving(tmp_path / "models", backend_settings=settings) as repository:
        assert (await infer(repository, "m", {"x": np.ones((1, 4), np.float32)}))["y"].tolist() == [[5.0] * 4]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"speed": "9"}, "no parameter 'speed'; it has precision_mode"),
        ({"opt_shapes": "x"}, "'x' is not a shape"),
        ({"max_shapes": "z:1x4"}, "no input is called 'z'"),
        ({"tune": "maybe"}, "tune='maybe': expected true or false"),
        ({"budget_seconds": "soon"}, "budget_seconds='soon': expected a number"),
        ({"calibration": "../other/data.npz"}, "there is no such file"),
    ],
)
async def test_what_an_accelerator_can_not_be_asked_is_refused(
    tmp_path: Path, parameters: dict[str, str], message: str
) -> None:
    write_onnx(tmp_path / "models", "m", accelerated(**parameters))
    settings = {"onnxruntime": {"cache-directory": str(tmp_path / "plans")}}
    with pytest.raises(ModelLoadError, match=message):
        async with serving(tmp_path / "models", backend_settings=settings):
            pass


async def test_a_warm_up_runs_the_plan(tmp_path: Path) -> None:
    sample = 'inputs { key: "x" value { data_type: TYPE_FP32 dims: 4 zero_data: true } }'
    write_plan(tmp_path, "m", scaling_model(2.0), f'{CPU} model_warmup {{ name: "s" batch_size: 2 {sample} }}')
    async with serving(tmp_path) as repository:
        assert (await infer(repository, "m", {"x": np.ones((1, 4), np.float32)}))["y"].tolist() == [[2.0] * 4]
