"""Loops over the images of a batch against the operators' meaning."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.graph.native_check import GraphMaker, isa, needs_native
from trine.graph.ir import Value
from trine.graph.native import Executor, slices
from trine.graph.runtime import Program

__all__ = ["isa"]
pytestmark = needs_native


def conv(g: GraphMaker, x: Any, filters: int, residual: Value | None = None, **given: Any) -> Any:
    size = given.pop("size", 3)
    channels = x.static_shape[1] // given.get("group", 1)
    weight = torch.randn(filters, channels, size, size) / (channels * size * size) ** 0.5
    attributes = {"strides": [1, 1], "dilations": [1, 1], "pads": [size // 2] * 4, "group": 1, "activation": "relu"}
    return g.node("FusedConv", x, weight, torch.randn(filters), residual, **{**attributes, **given})


def check(g: GraphMaker, outputs: list[Value], loops: int) -> None:
    """The executor's results, twice, are the operators'; it runs so many loops."""
    g.graph.outputs, g.graph.output_names = outputs, [f"y{index}" for index in range(len(outputs))]
    executor = Executor(g.graph, {}, lambda node: None, {})
    expected = Program(g.graph).run(*g.arguments)
    for _ in range(2):
        for got, wanted in zip(executor.run(g.arguments), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    steps = executor.program(tuple(x.shape for x in g.arguments)).tape.steps
    assert len({step.loop for step in steps} - {None}) == loops


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of a few kilobytes count as large."""
    monkeypatch.setattr(slices, "_LEAST_BYTES", 12_000)


def test_a_network_with_branches_and_residuals(isa: str) -> None:
    """What leaves the loop is read there and outside of it; small images join it between large ones, not at the end."""
    g = GraphMaker()
    x = g.input(torch.randn(3, 3, 18, 14))
    first = conv(g, x, 32)
    deep = conv(g, conv(g, first, 32, group=32), 32, first, activation="", size=1)
    gate = g.node("Sigmoid", g.node("GlobalAveragePool", deep))
    scaled = g.node("Mul", deep, gate)
    pooled = g.node("MaxPool", g.node("Concat", scaled, first, axis=1), kernel_shape=[2, 2], strides=[2, 2])
    small = conv(g, g.node("MaxPool", pooled, kernel_shape=[3, 3], strides=[3, 3]), 8)
    check(g, [g.node("Relu", small), first], 1)


def test_a_decoder_with_a_skip(isa: str) -> None:
    g = GraphMaker()
    skip = conv(g, g.input(torch.randn(2, 8, 24, 24)), 16)
    low = conv(g, g.node("MaxPool", skip, kernel_shape=[2, 2], strides=[2, 2]), 32)
    up = g.node("ConvTranspose", low, torch.randn(32, 16, 2, 2), torch.randn(16), strides=[2, 2])
    check(g, [conv(g, g.node("Concat", up, skip, axis=1), 5)], 1)


def test_weights_that_look_like_images(isa: str) -> None:
    """A filter for each of four images, and constants for each: nothing to take apart."""
    g = GraphMaker()
    x, weight = g.input(torch.randn(4, 4, 16, 16)), g.input(torch.randn(4, 4, 1, 1))
    y = g.node("Add", g.node("Conv", x, weight), torch.randn(4, 4, 16, 16))
    check(g, [g.node("Concat", y, y, axis=0)], 0)
