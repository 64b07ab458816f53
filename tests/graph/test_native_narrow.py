"""Values that lie in bfloat16 between kernels, and the kernels that read and write them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.graph.native_check import GraphMaker, isa, needs_native
from trine.graph.native.narrow import has_tiles

__all__ = ["isa"]
pytestmark = needs_native
ROUNDING = 2e-2
"""Of the largest result: a few values rounded to 8 bits on the way."""


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def weight(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape) / torch.tensor(shape[1:]).prod() ** 0.5).to(torch.bfloat16)


def conv(g: GraphMaker, x: Any, w: torch.Tensor, residual: Any = None, **given: Any) -> Any:
    kernel = w.shape[2]
    attributes: dict[str, Any] = {"strides": [1, 1], "pads": [kernel // 2] * 4, "dilations": [1, 1], "group": 1}
    return g.node(
        "ReducedConv", x, w, torch.randn(len(w)) * 0.1, residual, **{"activation": "relu", **attributes, **given}
    )


@pytest.mark.parametrize(("channels", "size"), [(3, 43), (4, 70), (32, 41)])
def test_images(isa: str, channels: int, size: int) -> None:
    """From a model's own image through every kernel that takes either type."""
    g = GraphMaker()
    x = conv(g, g.input(torch.randn(2, channels, size, size)), weight(32, channels, 3, 3))
    first = conv(g, x, weight(64, 32, 3, 3), strides=[2, 2], activation="silu")
    y = conv(g, first, weight(64, 1, 3, 3), group=64, activation="relu6")
    y = conv(g, y, weight(64, 64, 1, 1), first)
    y = g.node("MaxPool", y, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    y = g.node("ConvTranspose", y, torch.randn(64, 24, 2, 2) / 8, torch.randn(24), strides=[2, 2])
    y = g.node("Concat", y, conv(g, y, weight(40, 24, 3, 3)), axis=1)
    y = conv(g, y, weight(10, 64, 3, 3))
    mean = g.node("Flatten", g.node("GlobalAveragePool", y), axis=1)
    program = g.check(
        [conv(g, y, weight(2, 10, 1, 1)), g.node("ReducedLinear", mean, weight(7, 10), activation="")], ROUNDING
    )
    assert len(program.recorder.narrow) == (11 if has_tiles() else 0)


@pytest.mark.parametrize(("heads", "size", "length"), [(2, 32, 20), (3, 24, 77)])
def test_rows(isa: str, heads: int, size: int, length: int) -> None:
    """A block of a transformer."""
    width = heads * size
    g = GraphMaker()
    x = g.node(
        "ReducedLinear", g.input(torch.randn(2, length, 30)), weight(width, 30), torch.randn(width), activation=""
    )
    y = g.node("LayerNormalization", x, torch.rand(width) + 0.5, torch.randn(width))
    parts = []
    for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
        part = g.node("ReducedLinear", y, weight(width, width), activation="")
        part = g.node("Reshape", part, torch.tensor([2, length, heads, size]))
        parts.append(g.node("Transpose", part, perm=order))
    mask = g.input(torch.where(torch.rand(2, 1, 1, length) < 0.3, float("-inf"), 0.0))
    y = g.node("ScaledDotProductAttention", *parts, mask, scale=size**-0.5, k_transposed=1)
    y = g.node("Reshape", g.node("Transpose", y, perm=[0, 2, 1, 3]), torch.tensor([2, length, width]))
    x = g.node("ReducedLinear", y, weight(width, width), torch.randn(width), x, activation="")
    y = g.node(
        "ReducedLinear", g.node("LayerNormalization", x, torch.ones(width)), weight(99, width), activation="gelu"
    )
    program = g.check(g.node("ReducedLinear", y, weight(width, 99), None, x, activation=""), ROUNDING)
    assert len(program.recorder.narrow) == (17 if has_tiles() else 0)


def test_hidden_rows_of_attention(isa: str) -> None:
    """A query that sees nothing is not a number, or zeros where the model guards against it."""
    for guarded in (0, 1):
        g = GraphMaker()
        mask = torch.zeros(1, 1, 9, 9)
        mask[..., 4, :] = float("-inf")
        q, k, v = (
            g.node("ReducedLinear", g.input(torch.randn(1, 2, 9, 16)), weight(16, 16), activation="") for _ in "qkv"
        )
        y = g.node("ScaledDotProductAttention", q, k, v, g.input(mask), scale=0.25, guarded=guarded)
        g.check(g.node("ReducedLinear", y, weight(8, 16), activation=""), ROUNDING)


def test_python_sees_float32(isa: str) -> None:
    """Whoever has no kernel for bfloat16 keeps values as they are: other operators, and rules that give up."""
    g = GraphMaker()
    x = g.input(torch.randn(1, 16, 12, 12))
    y = conv(g, x, weight(16, 16, 3, 3))
    pooled, _ = g.node("MaxPool", y, outputs=2, kernel_shape=[2, 2], strides=[2, 2])
    program = g.check(
        [conv(g, pooled, weight(16, 16, 1, 1)), g.node("Neg", conv(g, x, weight(8, 16, 1, 1)))],
        ROUNDING,
        native=False,
    )
    assert [node.op for node in program.python_nodes] == ["MaxPool"]
    assert not program.recorder.narrow


@pytest.mark.parametrize("channels", [16, 24, 48, 64])
@pytest.mark.parametrize(
    "given", [{}, {"strides": [2, 2]}, {"dilations": [2, 3], "pads": [2, 3, 2, 3]}, {"pads": [0, 0, 2, 1]}]
)
def test_convolutions_of_larger_images(isa: str, channels: int, given: dict[str, Any]) -> None:
    """Tasks that copy their own lines, and images of few lines that share a copy."""
    for shape in ((2, channels, 33, 30), (1, channels, 9, 7)):
        g = GraphMaker()
        y = conv(g, g.input(torch.randn(shape)), weight(channels, channels, 1, 1))
        g.check(conv(g, y, weight(33, channels, 3, 3), activation="", **given), ROUNDING)
