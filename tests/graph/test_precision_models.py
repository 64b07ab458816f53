"""Models that say themselves what is quantised, against ONNX Runtime, which computes each node as it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

import trine.graph as tg

onnxruntime = pytest.importorskip("onnxruntime")
quantization = pytest.importorskip("onnxruntime.quantization")
KINDS = {"uint8": quantization.QuantType.QUInt8, "int8": quantization.QuantType.QInt8}


class Block(nn.Module):
    """Convolutions of all kinds, a residual, pooling, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU6(), nn.Conv2d(16, 16, 1))
        self.last = nn.Sequential(nn.Conv2d(32, 24, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        y = nn.functional.max_pool2d(torch.cat([torch.relu(x + self.second(x)), x], 1), 2)
        out: torch.Tensor = self.head(self.last(y))
        return out


class Rows(nn.Module):
    """Products with bias, GELU and a sum, a transposition between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(32, 64), nn.Linear(64, 32), nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x + self.down(nn.functional.gelu(self.up(x))))
        out: torch.Tensor = y.transpose(1, 2) @ y
        return out


class Samples(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, arrays: list[Any]) -> None:
        self.left = [{"x": array} for array in arrays]

    def get_next(self) -> dict[str, Any] | None:
        return self.left.pop() if self.left else None


def exported(module: nn.Module, shape: tuple[int, ...], path: Path) -> list[Any]:
    """Writes the module; gives some inputs."""
    torch.manual_seed(0)
    names = {"input_names": ["x"], "output_names": ["y"]}
    torch.onnx.export(module.eval(), (torch.randn(shape),), str(path), dynamo=False, opset_version=17, **names)  # type: ignore[arg-type]
    return [np.random.default_rng(seed).standard_normal(shape).astype(np.float32) for seed in range(4)]


def as_written(path: Path | bytes, x: Any) -> Any:
    """ONNX Runtime's answer without fusions: its own kernels of 8 bits saturate on some processors."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path if isinstance(path, bytes) else str(path), options)
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("written", ["QDQ", "QOperator"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("activations", "weights"), [("uint8", "int8"), ("int8", "int8"), ("uint8", "uint8")])
@pytest.mark.parametrize("kind", ["images", "rows"])
def test_explicit_models(
    tmp_path: Path, kind: str, activations: str, weights: str, per_channel: bool, written: str
) -> None:
    kinds = {"op_types_to_quantize": ["Conv", "MatMul"]} if written == "QOperator" else {}  # ONNX's own operators
    module, shape = (Block(), (2, 3, 32, 32)) if kind == "images" else (Rows(), (2, 9, 32))
    inputs = exported(module, shape, tmp_path / "plain.onnx")
    target = tmp_path / "quantised.onnx"
    quantization.quantize_static(
        tmp_path / "plain.onnx",
        target,
        Samples(inputs),
        quant_format=quantization.QuantFormat[written],
        **kinds,
        per_channel=per_channel,
        activation_type=KINDS[activations],
        weight_type=KINDS[weights],
    )
    if written == "QDQ":
        expected = as_written(target, inputs[0])
    else:  # ONNX Runtime's sums of 8-bit products saturate
        expected = tg.build(target, optimise=False).run({"x": inputs[0]})["y"]
    plan = tg.build(target, tune=False)
    made = plan.run({"x": inputs[0]})["y"]
    # A number that lies between two steps may go either way, at each of a few roundings in a row.
    step = _largest_step(target)
    assert np.abs(made - expected).max() <= 2 * step
    assert np.abs(made - expected).mean() <= 0.2 * step
    if written == "QDQ" or weights == "int8":  # zero points of their own may not leave room for a sign
        assert any(node.op.startswith("Quantized") for node in plan.graph.nodes)
    if kind == "images" and weights == "int8":
        assert {"Conv", "FusedConv"}.isdisjoint(node.op for node in plan.graph.nodes)


def _largest_step(path: Path) -> float:
    """The largest scale with which an activation is rounded."""
    graph = onnx.load(path).graph
    names = {node.input[1] for node in graph.node if node.op_type == "QuantizeLinear"}
    names |= {node.input[6] for node in graph.node if node.op_type in ("QLinearConv", "QLinearMatMul")}
    return max(float(numpy_helper.to_array(item).max()) for item in graph.initializer if item.name in names)


def pair(name: str, scale: float, zero: int, dtype: Any) -> tuple[list[Any], list[Any]]:
    """QuantizeLinear and DequantizeLinear of `name`, and their constants."""
    nodes = [
        helper.make_node("QuantizeLinear", [name, f"{name}_s", f"{name}_z"], [f"{name}_q"]),
        helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_s", f"{name}_z"], [f"{name}_d"]),
    ]
    constants = {f"{name}_s": np.float32(scale), f"{name}_z": np.array(zero, dtype)}
    return nodes, [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()]


def product_model(weight: Any, weight_zero: Any, scales: Any, axis: int, depth: int) -> bytes:
    """y = x W, quantised before and after."""
    before, constants = pair("x", 0.02, 130, np.uint8)
    after, more = pair("h", 0.5, 3, np.uint8)
    weights = helper.make_node("DequantizeLinear", ["w", "w_s", "w_z"], ["w_d"], axis=axis)
    product = helper.make_node("MatMul", ["x_d", "w_d"], ["h"])
    after[-1].output[0] = "y"
    for key, value in (("w", weight), ("w_s", scales), ("w_z", weight_zero)):
        constants.append(numpy_helper.from_array(value, key))
    graph = helper.make_graph(
        [*before, weights, product, *after],
        "g",
        [helper.make_tensor_value_info("x", 1, ["n", depth])],
        [helper.make_tensor_value_info("y", 1, None)],
        [*constants, *more],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(made.SerializeToString())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("zero", [0, 128, 3])
def test_scales_on_either_axis_and_weights_with_zero_points(axis: int, zero: int) -> None:
    """A scale for each row of the matrix can't leave the sum: such a product stays one of floats."""
    rng = np.random.default_rng(0)
    depth, columns = 24, 10
    weight = rng.integers(0, 256, (depth, columns)).astype(np.uint8)
    count = (depth, columns)[axis]
    scales = rng.uniform(0.01, 0.05, count).astype(np.float32)
    model = product_model(weight, np.full(count, zero, np.uint8), scales, axis, depth)
    x = rng.standard_normal((7, depth)).astype(np.float32)
    plan = tg.build(model, tune=False)
    assert np.abs(plan.run({"x": x})["y"] - as_written(model, x)).max() <= 0.5 + 1e-6
    folded = any(node.op == "QuantizedLinear" for node in plan.graph.nodes)
    assert folded == (axis == 1 and zero == 128)


def test_pairs_of_different_scales_stay() -> None:
    """Rounded twice to different steps is not rounded once."""
    first, constants = pair("x", 0.1, 0, np.uint8)
    second, more = pair("x_d", 0.07, 5, np.uint8)
    second[-1].output[0] = "y"
    graph = helper.make_graph(
        [*first, *second],
        "g",
        [helper.make_tensor_value_info("x", 1, ["n"])],
        [helper.make_tensor_value_info("y", 1, None)],
        [*constants, *more],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    x = np.linspace(-3, 30, 500, dtype=np.float32)
    plan = tg.build(model, tune=False)
    np.testing.assert_allclose(plan.run({"x": x})["y"], as_written(model, x), atol=1e-6)
    assert [node.op for node in plan.graph.nodes] == ["QuantizeLinear", "DequantizeLinear"] * 2
