"""Convolutions, pooling and resizing by native kernels against the operators' meaning."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.graph.native_check import GraphMaker, isa, needs_native
from trine.graph.native import NativeProgram, Packed
from trine.graph.native.args import ACTIVATIONS
from trine.graph.native.convolution import ConvArgs
from trine.graph.native.pooling import PoolArgs
from trine.graph.native.recorder import RULES
from trine.graph.native.tape import find_kernel

__all__ = ["isa"]
pytestmark = needs_native


def conv(
    g: GraphMaker, x: Any, weight: torch.Tensor, bias: torch.Tensor | None = None, residual: Any = None, **given: Any
) -> Any:
    attributes = {"strides": [1, 1], "dilations": [1, 1], "pads": [0] * 4, "group": 1, "activation": "", **given}
    return g.node("FusedConv", x, weight, bias, residual, **attributes)


def kernels_of(program: NativeProgram) -> list[str]:
    """The kernels of all steps, "copy" for those of other modules."""
    names = {find_kernel(name, ConvArgs): name for name in ("conv", "winograd2", "winograd4", "depthwise")}
    names[find_kernel("pool", PoolArgs)] = "pool"
    return [names.get(step.kernel, "copy") for step in program.tape.steps]


def variant_of(program: NativeProgram) -> str:
    """The kernel of the only step that is no copy."""
    [name] = [name for name in kernels_of(program) if name != "copy"]
    return name


def only(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """No other rule for convolutions than this."""
    monkeypatch.setitem(RULES, "FusedConv", {variant: RULES["FusedConv"][variant]})


def random_conv(rng: random.Random, depthwise: bool) -> dict[str, Any]:
    """Attributes and sizes of a convolution that fits its input."""
    while True:
        group = rng.choice([2, 3, 17, 33, 64, 100]) if depthwise else rng.choice([1, 1, 1, 2, 3])
        channels = 1 if depthwise else rng.choice([1, 3, 5, 8, 12, 17, 32])
        filters = 1 if depthwise else rng.choice([1, 3, 8, 9, 16, 17, 40])
        kernel = [rng.randint(1, 5), rng.randint(1, 5)] if rng.random() < 0.4 else [rng.choice([1, 3, 5])] * 2
        strides = [rng.randint(1, 3), rng.randint(1, 3)] if rng.random() < 0.4 else [rng.choice([1, 2])] * 2
        dilations = [rng.choice([1, 1, 2]), rng.choice([1, 1, 3])]
        pads = [rng.randint(0, 3) for _ in range(4)] if rng.random() < 0.7 else [0] * 4
        size = [rng.choice([1, 2, 5, 7, 13, 20]), rng.choice([1, 2, 6, 7, 14, 19])]
        if all(size[i] + pads[i] + pads[i + 2] > (kernel[i] - 1) * dilations[i] for i in range(2)):
            break
    return {
        "x": (rng.choice([1, 1, 2, 3]), channels * group, *size),
        "weight": (filters * group, channels, *kernel),
        "attributes": {"group": group, "strides": strides, "dilations": dilations, "pads": pads},
    }


@pytest.mark.parametrize("depthwise", [False, True])
def test_random_convolutions(depthwise: bool, isa: str) -> None:
    rng = random.Random(5)
    for _ in range(60):
        case = random_conv(rng, depthwise)
        g = GraphMaker()
        x, weight = g.input(torch.randn(case["x"])), torch.randn(case["weight"])
        weight /= weight[0].numel() ** 0.5
        bias = torch.randn(weight.shape[0]) if rng.random() < 0.6 else None
        activation = rng.choice(ACTIVATIONS)
        y = conv(g, x, weight, bias, activation=activation, **case["attributes"])
        if rng.random() < 0.4:
            residual = g.input(torch.randn(y.static_shape))
            g.graph.nodes[-1].inputs[3] = residual
        program = g.check(y)
        assert not depthwise or variant_of(program) == "depthwise"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tile", [2, 4])
def test_winograd(tile: int, activation: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, f"winograd{tile}")
    rng = random.Random(tile)
    for _ in range(4):
        channels, filters, images = rng.choice([16, 48, 400]), rng.choice([16, 32, 80]), rng.choice([1, 3])
        pads = [rng.randint(0, 3) for _ in range(4)]
        g = GraphMaker()
        x = g.input(torch.randn(images, channels, rng.choice([9, 14, 17]), rng.choice([16, 21])))
        bias = torch.randn(filters) if rng.random() < 0.5 else None
        weight = torch.randn(filters, channels, 3, 3) / (9 * channels) ** 0.5
        y = conv(g, x, weight, bias, None, pads=pads, activation=activation)
        if rng.random() < 0.5:
            g.graph.nodes[-1].inputs[3] = g.input(torch.randn(y.static_shape))
        assert variant_of(g.check(y, 2e-5)) == f"winograd{tile}"


def test_winograd_rounds_as_a_plain_sum_does(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Largest error against float64, in parts of the output's scale."""
    x, weight = torch.randn(1, 256, 28, 28), torch.randn(64, 256, 3, 3)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    rules = dict(RULES["FusedConv"])
    errors = {}
    for variant in ("direct", "winograd2", "winograd4"):
        monkeypatch.setitem(RULES, "FusedConv", {variant: rules[variant]})
        g = GraphMaker()
        g.graph.outputs = [conv(g, g.input(x), weight, pads=[1] * 4)]
        g.graph.output_names = ["y"]
        [y] = NativeProgram(g.graph, Packed(g.graph)).run(x)
        errors[variant] = float((y - exact).abs().max() / exact.abs().max())
    assert errors["direct"] < 3e-6
    assert errors["winograd2"] < 3e-6
    assert errors["winograd4"] < 1e-5, errors


def test_few_tiles_or_odd_channels_are_not_for_winograd() -> None:
    for shape, filters in (((1, 64, 6, 6), 64), ((1, 24, 30, 30), 64), ((1, 32, 30, 30), 24)):
        g = GraphMaker()
        y = conv(g, g.input(torch.randn(shape)), torch.randn(filters, shape[1], 3, 3), pads=[1] * 4)
        assert variant_of(g.check(y)) == "conv"


def test_chain_of_convolutions_needs_no_copies() -> None:
    """A residual block on an image as it comes: only the result is brought into the caller's order."""
    g = GraphMaker()
    x = g.input(torch.randn(2, 3, 33, 35))
    a = conv(g, x, torch.randn(32, 3, 7, 7), torch.randn(32), strides=[2, 2], pads=[3] * 4, activation="relu")
    b = conv(g, a, torch.randn(16, 32, 1, 1), activation="relu6")
    c = conv(g, b, torch.randn(16, 16, 3, 3), pads=[1] * 4, activation="silu")
    d = conv(g, c, torch.randn(32, 16, 1, 1), torch.randn(32), a, activation="relu")
    e = g.node("GlobalAveragePool", d)
    assert kernels_of(g.check([d, e])) == ["conv", "conv", "winograd4", "conv", "pool", "copy"]


def test_values_that_are_not_numbers(isa: str) -> None:
    """They stay in the outputs that read them."""
    x = torch.randn(1, 32, 12, 12)
    x[0, 3, 4, 5] = float("nan")
    x[0, 7, 9, 9] = float("inf")
    g = GraphMaker()
    given = g.input(x)
    pointwise = conv(g, given, torch.rand(16, 32, 1, 1), activation="relu")
    depthwise = conv(g, given, torch.rand(32, 1, 3, 3), group=32, pads=[1] * 4, activation="relu6")
    pooled = g.node("MaxPool", given, kernel_shape=[3, 3], strides=[2, 2])
    g.check([pointwise, depthwise, pooled])


def test_transposed(isa: str) -> None:
    rng = random.Random(3)
    for _ in range(40):
        group, kernel = rng.choice([1, 1, 2]), [rng.randint(1, 5), rng.randint(1, 4)]
        strides, size = [rng.randint(1, 3), rng.randint(1, 4)], [rng.randint(1, 9), rng.randint(1, 9)]
        extra = [rng.randint(0, strides[0] - 1), rng.randint(0, strides[1] - 1)]
        most = [((size[i] - 1) * strides[i] + kernel[i] + extra[i] - 1) // 2 for i in range(2)]
        pads = [rng.randint(0, min(2, most[i % 2])) for i in range(4)]
        g = GraphMaker()
        x = g.input(torch.randn(rng.choice([1, 2]), group * rng.choice([1, 3, 16, 20]), *size))
        weight = torch.randn(x.static_shape[1], rng.choice([1, 5, 16, 24]), *kernel)
        bias = torch.randn(weight.shape[1] * group) if rng.random() < 0.5 else None
        attributes = {"strides": strides, "pads": pads, "group": group, "output_padding": extra}
        g.check(g.node("ConvTranspose", x, weight, bias, **attributes))


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_pooling(op: str, isa: str) -> None:
    rng = random.Random(4)
    for _ in range(40):
        kernel = [rng.randint(1, 4), rng.randint(1, 4)]
        pads = [rng.randint(0, kernel[i % 2] - 1) for i in range(4)]
        g = GraphMaker()
        x = g.input(
            torch.randn(rng.choice([1, 3]), rng.choice([1, 3, 17, 32, 70]), rng.randint(5, 14), rng.randint(5, 14))
        )
        attributes: dict[str, Any] = {"strides": [rng.randint(1, 3), rng.randint(1, 3)], "ceil_mode": rng.randint(0, 1)}
        attributes |= {"auto_pad": "SAME_UPPER"} if rng.random() < 0.2 else {"pads": pads}
        if op == "AveragePool":
            attributes["count_include_pad"] = rng.randint(0, 1)
        elif rng.random() < 0.3:
            attributes["dilations"] = [1, 2] if kernel[1] < 3 else [1, 1]
        g.check(g.node(op, x, kernel_shape=kernel, **attributes))


@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 37, 7, 7), (1, 2048, 7, 7), (3, 5, 60, 41)])
def test_global_pooling(op: str, shape: tuple[int, ...], isa: str) -> None:
    g = GraphMaker()
    g.check(g.node(op, g.input(torch.randn(shape))))


@pytest.mark.parametrize("coordinates", ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scales", [(2.0, 2.0), (0.5, 0.7), (1.0, 2.6)])
def test_resize(mode: str, coordinates: str, scales: tuple[float, float], isa: str) -> None:
    for channels in (3, 16, 21):
        g = GraphMaker()
        x = g.input(torch.randn(2, channels, 9, 12))
        attributes = {"mode": mode, "coordinate_transformation_mode": coordinates}
        g.check(g.node("Resize", x, None, torch.tensor([1.0, 1.0, *scales]), **attributes))
