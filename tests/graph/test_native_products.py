"""Products of matrices and attention against the operators' meaning."""

from __future__ import annotations

import pytest
import torch

from tests.graph.native_check import GraphMaker, isa, needs_native

__all__ = ["isa"]
pytestmark = needs_native


@pytest.mark.parametrize(
    "shapes",
    [
        ((3, 4), (4, 5)),
        ((1, 1), (1, 1)),
        ((7, 130), (130, 33)),
        ((2, 3, 20, 8), (2, 3, 8, 40)),
        ((2, 1, 20, 8), (3, 8, 17)),
        ((5, 6), (4, 6, 3)),
        ((6,), (6, 3)),
        ((2, 5, 6), (6,)),
        ((6,), (6,)),
        ((150, 600), (600, 300)),
        ((2, 1, 3, 1, 4, 5), (1, 3, 1, 2, 5, 4)),
    ],
    ids=str,
)
def test_matmul(shapes: tuple[tuple[int, ...], tuple[int, ...]], isa: str) -> None:
    g = GraphMaker()
    a, b = (g.input(torch.randn(shape)) for shape in shapes)
    g.check(g.node("MatMul", a, b))


def test_matmul_of_turned_operands(isa: str) -> None:
    g = GraphMaker()
    a = g.node("Transpose", g.input(torch.randn(2, 9, 20)), perm=[0, 2, 1])
    b = g.node("Transpose", g.input(torch.randn(2, 30, 9)), perm=[0, 2, 1])
    c = g.node("Transpose", g.input(torch.randn(9, 30, 2)), perm=[2, 0, 1])
    x, y = g.input(torch.randn(5, 9)), g.input(torch.randn(5, 7))
    g.check([g.node("MatMul", a, b), g.node("MatMul", a, c), g.node("Gemm", x, y, transA=1)])


@pytest.mark.parametrize("n", [1, 10, 16, 50])
def test_linear(n: int, isa: str) -> None:
    for rows, k in ((1, 7), (5, 64), (200, 40)):
        for activation in ("", "relu", "gelu", "silu", "hardswish"):
            g = GraphMaker()
            x, residual = g.input(torch.randn(2, rows, k)), g.input(torch.randn(2, rows, n))
            weight, bias = torch.randn(n, k), torch.randn(n)
            y = g.node("Linear", x, weight, bias, residual, activation=activation)
            g.check([y, g.node("Linear", x, weight, activation=activation)], 3e-5)


def test_linear_of_columns_of_a_wider_matrix(isa: str) -> None:
    g = GraphMaker()
    x = g.node("Slice", g.input(torch.randn(6, 50)), torch.tensor([3]), torch.tensor([40]), torch.tensor([1]))
    g.check(g.node("Linear", x, torch.randn(9, 37), activation=""), 3e-5)


@pytest.mark.parametrize(
    "sizes", [(2, 3, 5, 7, 8, 8), (1, 1, 1, 1, 1, 1), (1, 12, 128, 128, 64, 64), (1, 2, 300, 301, 17, 33)], ids=str
)
@pytest.mark.parametrize("mask", [None, "keys", "full", "row"])
def test_attention(sizes: tuple[int, ...], mask: str | None, isa: str) -> None:
    batch, heads, queries, keys, size, v_size = sizes
    if queries * keys > 20000 and isa == "emulated":
        return
    g = GraphMaker()
    q, k, v = (
        g.node("Transpose", g.input(torch.randn(batch, rows, heads, width)), perm=[0, 2, 1, 3])
        for rows, width in ((queries, size), (keys, size), (keys, v_size))
    )
    k = g.node("Transpose", k, perm=[0, 1, 3, 2])
    shape = {"keys": (batch, 1, 1, keys), "full": (batch, heads, queries, keys), "row": (queries, 1), None: ()}[mask]
    bias = torch.randn(shape)
    if mask == "keys":
        bias[..., keys // 2 + 1 :] = float("-inf")
    given = () if mask is None else (g.input(bias),)
    y = g.node("ScaledDotProductAttention", q, k, v, *given, scale=0.3, k_transposed=1)
    g.check(g.node("Transpose", y, perm=[0, 2, 1, 3]), 2e-5)
