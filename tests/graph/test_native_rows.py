"""Softmax, normalisations, reductions against the operators' meaning."""

from __future__ import annotations

import pytest
import torch

from tests.graph.native_check import GraphMaker, isa, needs_native

__all__ = ["isa"]
pytestmark = needs_native
SHAPES = [(5, 7), (3, 1), (1, 130), (2, 3, 40, 5), (4, 33, 1, 1), (9,), (64, 768)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_softmax(op: str, shape: tuple[int, ...], isa: str) -> None:
    for axis in range(-1, len(shape) - 1):
        g = GraphMaker()
        g.check(g.node(op, g.input(torch.randn(shape) * 5), axis=axis))


def test_softmax_of_what_is_no_number(isa: str) -> None:
    low, nan = float("-inf"), float("nan")
    x = torch.tensor([[1.0, low, 2.0], [low, low, low], [nan, 1.0, 2.0], [1e30, 1.0, -1e30]])
    for axis in (0, 1):
        g = GraphMaker()
        g.check(g.node("Softmax", g.input(x), axis=axis))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm(shape: tuple[int, ...], isa: str) -> None:
    for axis in {-1, 0}:
        own = shape[axis:]
        g = GraphMaker()
        x, scale, bias = g.input(torch.randn(shape) + 3), torch.randn(own), torch.randn(own)
        plain = g.node("LayerNormalization", x, scale, bias, axis=axis, epsilon=1e-3)
        bare = g.node("LayerNormalization", x, scale, axis=axis)
        g.check([plain, bare, g.node("RMSNormalization", x, scale, axis=axis)], 3e-5)


@pytest.mark.parametrize("last", [False, True])
def test_group_norm(last: bool, isa: str) -> None:
    for n, c, places, groups in ((2, 12, (5, 7), 3), (1, 32, (4, 4), 32), (3, 8, (9,), 1), (1, 6, (1, 1), 2)):
        g = GraphMaker()
        shape = (n, *places, c) if last else (n, c, *places)
        x = g.input(torch.randn(shape) + 2)
        if last:
            x = g.node("Transpose", x, perm=[0, len(shape) - 1, *range(1, len(shape) - 1)])
        scale, bias = torch.randn(c), torch.randn(c)
        group = g.node("GroupNormalization", x, scale, bias, num_groups=groups)
        g.check([group, g.node("InstanceNormalization", x, scale, bias)], 1e-4)


REDUCTIONS = ["Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare"]


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_reductions(kind: str, isa: str) -> None:
    for shape, axes in (
        ((4, 5, 6), [1]),
        ((4, 5, 6), [0, 2]),
        ((2, 3, 17, 19), [2, 3]),
        ((3, 70), [-1]),
        ((3, 1, 9), [1]),
        ((300, 40), [0]),
        ((7,), None),
    ):
        for keep in (0, 1):
            g = GraphMaker()
            x = g.input(torch.rand(shape) + 0.5)
            given = () if axes is None else (torch.tensor(axes),)
            g.check(g.node(f"Reduce{kind}", x, *given, keepdims=keep), 2e-5)


def test_means_over_images_need_no_copy(isa: str) -> None:
    g = GraphMaker()
    x = g.node("Transpose", g.input(torch.randn(2, 14, 14, 40)), perm=[0, 3, 1, 2])
    program = g.check(g.node("ReduceMean", x, torch.tensor([2, 3]), keepdims=0))
    assert len(program.tape.steps) == 1


def test_extremes_of_what_is_no_number(isa: str) -> None:
    x = torch.randn(4, 40)
    x[0, 3] = x[1, 37] = float("nan")
    for op in ("ReduceMax", "ReduceMin", "ReduceSum"):
        for axis in (0, 1):
            g = GraphMaker()
            g.check(g.node(op, g.input(x), torch.tensor([axis])))
