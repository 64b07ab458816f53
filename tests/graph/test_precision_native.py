"""The kernels on 8-bit integers and on bfloat16 against the operators' meaning, on every instruction set there is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from trine.graph.ir import Graph, Node, Value, constant
from trine.graph.native import NativeProgram, Packed
from trine.graph.native.tape import library
from trine.graph.runtime import Program
from trine.graph.shapes import infer_shapes
from trine.kernels.cpu.native import load

pytestmark = pytest.mark.skipif(load()[0] is None, reason="no native kernels here")
RESIDUAL = 4
BUILDS = ("amx", "avx512_bf16", "avx512", "avx2", "emulated")


@pytest.fixture(params=BUILDS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each build that this processor can run."""
    before = library().trine_isa()
    if library().trine_set_isa(request.param.encode()) != 0:
        pytest.skip(f"not on this processor: {request.param}")
    yield request.param
    library().trine_set_isa(before)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    limits = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(limits.min, limits.max + 1, shape, generator=generator).to(dtype)


def both(op: str, inputs: list[torch.Tensor | None], attributes: dict[str, Any], given: int = 1) -> Any:
    """The node's meaning and what the kernel makes of it; inputs from `given` on are constants, a residual aside."""
    values: list[Value | None] = []
    graph = Graph("test")
    arguments = []
    for index, tensor in enumerate(inputs):
        if tensor is None:
            values.append(None)
        elif index < given or (op.endswith(("Conv", "Linear")) and index == RESIDUAL):
            dtype = constant("", tensor).dtype
            values.append(Value(f"x{index}", dtype, tuple(tensor.shape)))
            graph.inputs.append(values[-1])
            arguments.append(tensor)
        else:
            values.append(constant(f"c{index}", tensor))
    y = Value("y")
    graph.nodes = [Node(op, values, [y], attributes, "node")]
    graph.outputs, graph.output_names = [y], ["y"]
    infer_shapes(graph)
    program = NativeProgram(graph, Packed(graph))
    assert not program.python_nodes
    expected = Program(graph).run(*arguments)[0]
    return expected, program.run(*arguments)[0]


def assert_near(expected: torch.Tensor, made: torch.Tensor) -> None:
    """Integers: one step apart at most, and seldom that. Floats: but for the order of sums."""
    assert made.dtype == expected.dtype
    assert made.shape == expected.shape
    if made.is_floating_point():
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-4)
        return
    difference = (made.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


CONVOLUTIONS = [
    # channels, filters, kernel, stride, pads, dilation, group, size
    (64, 48, 1, 1, (0, 0, 0, 0), 1, 1, 9),
    (3, 20, 7, 2, (3, 3, 3, 3), 1, 1, 23),
    (16, 33, 3, 1, (1, 1, 1, 1), 1, 1, 14),
    (24, 16, 3, 2, (0, 0, 1, 1), 1, 1, 11),
    (5, 7, 3, 1, (2, 2, 2, 2), 2, 1, 12),
    (12, 18, 3, 1, (1, 0, 1, 2), 1, 3, 8),
    (40, 40, 3, 1, (1, 1, 1, 1), 1, 40, 10),
    (35, 35, 5, 2, (2, 2, 2, 2), 1, 35, 13),
    (520, 70, 3, 1, (1, 1, 1, 1), 1, 1, 3),
]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("shape", CONVOLUTIONS)
def test_quantized_convolutions(isa: str, shape: tuple[Any, ...], signed: bool) -> None:
    channels, filters, kernel, stride, pads, dilation, group, size = shape
    x = integers(torch.int8 if signed else torch.uint8, 2, channels, size, size)
    w = integers(torch.int8, filters, channels // group, kernel, kernel, seed=1)
    w = w if signed else w // 2  # of bytes times these, two sum to 16 bits at most: AVX2 has a kernel for them
    scale = random(filters).abs() * 1e-3 + 1e-4
    depth = (w[0].numel()) ** 0.5
    y_dtype, activation = ("int8", "relu6") if signed else ("uint8", "relu")
    attributes: dict[str, Any] = {
        "strides": [stride, stride],
        "pads": list(pads),
        "dilations": [dilation, dilation],
        "group": group,
        "x_zero": -3 if signed else 117,
    }
    bias = random(filters)
    expected, made = both("QuantizedConv", [x, w, scale / depth, bias], {**attributes, "activation": "silu"})
    assert_near(expected, made)
    result = {"y_dtype": y_dtype, "y_scale": 0.04, "y_zero": -5 if signed else 9}
    expected, made = both("QuantizedConv", [x, w, scale / depth], {**attributes, **result, "activation": activation})
    assert_near(expected, made)
    residual = integers(torch.uint8, *expected.shape, seed=3)
    attributes |= {**result, "residual_scale": 0.02, "residual_zero": 100, "activation": "relu"}
    expected, made = both("QuantizedConv", [x, w, scale / depth, bias, residual], attributes)
    assert_near(expected, made)


@pytest.mark.parametrize("rows", [(1,), (5,), (3, 17), (2, 100)])
@pytest.mark.parametrize("size", [(64, 32), (147, 45), (1030, 20)])
@pytest.mark.parametrize("part", [1, 2])
def test_quantized_linear(isa: str, rows: tuple[int, ...], size: tuple[int, int], part: int) -> None:
    k, n = size
    x, w = integers(torch.uint8, *rows, k), integers(torch.int8, n, k, seed=1) // part
    scale, bias = (random(n).abs() + 0.1) * 2e-4 / k**0.5, random(n)
    expected, made = both("QuantizedLinear", [x, w, scale, bias], {"x_zero": 128, "activation": "gelu"})
    assert_near(expected, made)
    attributes = {"x_zero": 3, "y_dtype": "uint8", "y_scale": 0.05, "y_zero": 100, "activation": ""}
    residual = random(*rows, n, seed=4)
    assert_near(*both("QuantizedLinear", [x, w, scale, bias, residual], attributes))


def test_sums_of_extremes_are_exact(isa: str) -> None:
    """Where bytes multiplied in pairs would not fit 16 bits."""
    x = torch.full((40, 256), 255, dtype=torch.uint8)
    w = torch.full((32, 256), -128, dtype=torch.int8)
    w[1::2] = 127
    expected, made = both("QuantizedLinear", [x, w, torch.ones(32)], {"x_zero": 0, "activation": ""})
    assert torch.equal(expected, made)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_other_operators_on_bytes(isa: str, dtype: torch.dtype) -> None:
    name = "uint8" if dtype is torch.uint8 else "int8"
    x, other = integers(dtype, 2, 37, 9, 11), integers(torch.uint8, 2, 37, 9, 11, seed=5)
    pool = {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]}
    assert_near(*both("MaxPool", [x], pool))
    pair = {"a_scale": 0.0313, "a_zero": 4, "b_scale": 0.0117, "b_zero": 120, "y_scale": 0.0203, "y_zero": 11}
    assert_near(*both("QuantizedAdd", [x, other], {**pair, "y_dtype": name, "activation": "relu"}, given=2))
    mean = {"x_scale": 0.1, "x_zero": 7}
    assert_near(*both("QuantizedGlobalAveragePool", [x], mean))
    assert_near(*both("QuantizedGlobalAveragePool", [x], {**mean, "y_scale": 0.2, "y_zero": 3, "y_dtype": name}))
    scale, zero = torch.tensor(0.037), torch.tensor(5, dtype=dtype)
    assert_near(*both("DequantizeLinear", [x, scale, zero], {}))
    values = torch.cat([random(3, 1001) * 5, torch.tensor([[float("inf")], [float("-inf")], [1e30]])], 1)
    assert_near(*both("QuantizeLinear", [values, scale, zero], {}))
    assert_near(*both("QuantizeLinear", [random(2, 3, 41, 103) * 5, scale, zero], {}))


def test_results_do_not_depend_on_threads_or_on_the_batch(isa: str) -> None:
    x, w = integers(torch.uint8, 6, 32, 20, 20), integers(torch.int8, 48, 32, 3, 3, seed=1)
    attributes = {
        "strides": [1, 1],
        "pads": [1] * 4,
        "dilations": [1, 1],
        "group": 1,
        "x_zero": 9,
        "activation": "silu",
    }
    scale = random(48).abs() * 1e-4
    _, whole = both("QuantizedConv", [x, w, scale], attributes)
    _, alone = both("QuantizedConv", [x[2:3], w, scale], attributes)
    assert torch.equal(whole[2:3], alone)
    threads = library().trine_num_threads()
    library().trine_set_num_threads(5)
    _, again = both("QuantizedConv", [x, w, scale], attributes)
    library().trine_set_num_threads(threads)
    assert torch.equal(whole, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_sixteen_bits(isa: str, dtype: torch.dtype) -> None:
    """Within what rounding x, or not rounding it, changes."""
    for channels, filters, kernel, stride, pads, dilation, group, size in CONVOLUTIONS:
        x, w = random(2, channels, size, size), random(filters, channels // group, kernel, kernel, seed=1).to(dtype)
        attributes = {"strides": [stride] * 2, "pads": list(pads), "dilations": [dilation] * 2, "group": group}
        expected, made = both("ReducedConv", [x, w, random(filters)], {**attributes, "activation": "relu"})
        assert made.shape == expected.shape
        assert (made - expected).norm() <= 5e-3 * expected.norm()
    x, w = random(3, 17, 147), random(45, 147, seed=1).to(dtype)
    expected, made = both("ReducedLinear", [x, w, random(45)], {"activation": "gelu"})
    assert (made - expected).norm() <= 5e-3 * expected.norm()
