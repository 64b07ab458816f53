"""Sizes of zero and one in every place, and programs that meet many shapes: right or a clear error, never a crash."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import trine.graph as tg
from tests.graph.models import model, node, weights
from tests.graph.native_check import GraphMaker, needs_native

pytestmark = needs_native

NODES: dict[str, dict[str, Any]] = {
    "Relu": {}, "Softmax": {"axis": 1}, "Transpose": {"perm": [2, 0, 1]}, "ReduceSum": {}, "Flatten": {"axis": 2},
}  # fmt: skip


@pytest.mark.parametrize("op", NODES)
def test_one_operand(op: str) -> None:
    for shape in itertools.product((0, 1, 3), repeat=3):
        g = GraphMaker()
        axes = (torch.tensor([1]),) if op == "ReduceSum" else ()
        g.check(g.node(op, g.input(torch.randn(shape)), *axes, **NODES[op]), native=False)


def test_products_and_sums() -> None:
    for m, k, n in itertools.product((0, 1, 5), repeat=3):
        g = GraphMaker()
        a, b = g.input(torch.randn(2, m, k)), g.input(torch.randn(2, k, n))
        made = [g.node("MatMul", a, b), g.node("Add", a, g.input(torch.randn(k))), g.node("Concat", a, a, axis=1)]
        if k and n:
            made.append(g.node("Linear", a, torch.randn(n, k), activation="relu"))
        g.check(made, native=False)


def test_attention() -> None:
    for b, h, q, s in itertools.product((0, 1, 2), repeat=4):
        g = GraphMaker()
        x, k, v = (g.input(torch.randn(b, h, rows, 4)) for rows in (q, s, s))
        g.check(g.node("ScaledDotProductAttention", x, k, v, scale=0.5), native=False)


def test_a_plan_meets_more_shapes_than_it_keeps() -> None:
    made = model(
        [
            node("Conv", "x w", "c", pads=[1, 1, 1, 1]),
            node("Relu", "c", "r"),
            node("Transpose", "r", "t", perm=[0, 2, 3, 1]),
            node("MatMul", "t m", "y"),
        ],
        {"x": ["n", 3, "h", "w_"]},
        ["y"],
        {"w": weights(4, 3, 3, 3), "m": weights(4, 5)},
    )
    fast, slow = tg.build(made), tg.build(made, optimise=False)
    for n, h, w in itertools.product((1, 2, 5), (1, 2, 9), (1, 7, 8)):
        x = np.random.default_rng(h).standard_normal((n, 3, h, w)).astype(np.float32)
        for _ in range(2):
            np.testing.assert_allclose(fast.run({"x": x})["y"], slow.run({"x": x})["y"], rtol=1e-4, atol=1e-5)
