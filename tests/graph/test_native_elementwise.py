"""Elementwise chains against the operators' meaning, on odd shapes and every broadcast."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.graph.native_check import GraphMaker, isa, needs_native

__all__ = ["isa"]
pytestmark = needs_native

SHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((7,), (7,)),
    ((1,), (1,)),
    ((2, 3, 5), (3, 1)),
    ((1, 4, 1), (3, 1, 5)),
    ((2, 300), (2, 300)),
    ((5, 257), (257,)),
    ((3, 4, 2, 3, 2, 2), (4, 1, 3, 1, 2)),
    ((0, 4), (1, 4)),
    ((40, 1000), ()),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Min", "Max", "PRelu", "Less", "GreaterOrEqual", "Equal"])
def test_binary(op: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], isa: str) -> None:
    if op == "PRelu" and len(shapes[1]) and torch.broadcast_shapes(*shapes) != shapes[0]:
        return
    g = GraphMaker()
    a, b = (g.input(torch.randn(shape)) for shape in shapes)
    g.check(g.node(op, a, b), native=bool(a.nbytes))


@pytest.mark.parametrize("op", ["Add", "Mul", "Sub", "Less", "Equal", "Min", "Max"])
def test_integers(op: str, isa: str) -> None:
    for dtype in (torch.int64, torch.int32):
        g = GraphMaker()
        large = torch.iinfo(dtype).max
        a = g.input(torch.randint(-5, 5, (3, 70), dtype=dtype))
        b = g.input(torch.tensor([[1], [large], [-large]], dtype=dtype))
        g.check(g.node(op, a, b))


UNARY: dict[str, dict[str, Any]] = {
    "Neg": {}, "Abs": {}, "Reciprocal": {}, "Sqrt": {}, "Exp": {}, "Log": {}, "Floor": {}, "Ceil": {}, "Round": {},
    "Erf": {}, "Sin": {}, "Cos": {}, "Softplus": {}, "Softsign": {}, "IsNaN": {}, "Relu": {}, "Sigmoid": {},
    "Tanh": {}, "HardSwish": {}, "LeakyRelu": {"alpha": 0.2}, "Elu": {"alpha": 1.5},
    "HardSigmoid": {"alpha": 0.3, "beta": 0.4}, "Gelu": {}, 
}  # fmt: skip


@pytest.mark.parametrize("op", UNARY)
def test_unary(op: str, isa: str) -> None:
    extremes = torch.tensor([0.0, -0.0, 1e-20, -1e-6, 1e-3, 88.5, 95.0, -88.0, -103.0, -200.0, 1e30, -1e30])
    # torch's own Gelu of infinities is one thing or another, by the processor.
    infinities = [] if op == "Gelu" else [float("inf"), float("-inf")]
    special = torch.tensor([float("nan"), *infinities])
    for data in (torch.randn(1000) * 4, extremes, special, torch.randn(3, 1, 5)):
        g = GraphMaker()
        g.check(g.node(op, g.input(data), **UNARY[op]), 2e-6)


def test_precision_of_small_results(isa: str) -> None:
    """Relative, not absolute: tanh, erf and sigmoid of small numbers keep their digits."""
    x = torch.logspace(-30, 1, 4000).repeat_interleave(2) * torch.tensor([1.0, -1.0]).repeat(4000)
    for op in ("Tanh", "Erf", "Sigmoid", "Exp"):
        g = GraphMaker()
        y = g.node(op, g.input(x))
        program = g.check(y)
        got = program.run(*g.arguments)[0].double()
        exact = {"Tanh": torch.tanh, "Erf": torch.erf, "Sigmoid": torch.sigmoid, "Exp": torch.exp}[op](x.double())
        assert float(((got - exact) / exact).abs().max()) < 6e-7, op


def test_masks(isa: str) -> None:
    """What models make of an attention mask."""
    g = GraphMaker()
    mask = g.input(torch.randint(0, 2, (2, 9)))
    seen = g.node("Cast", mask, to=1)
    opened = g.node("Unsqueeze", g.node("Unsqueeze", seen, torch.tensor([1])), torch.tensor([2]))
    bias = g.node("Mul", g.node("Sub", torch.tensor(1.0), opened), torch.tensor(-3e38))
    wanted = g.node("Where", g.node("Cast", mask, to=9), torch.tensor(0.0), torch.tensor(float("-inf")))
    other = g.node("And", g.node("Not", g.node("Equal", mask, torch.tensor(0))), g.node("Cast", mask, to=9))
    g.check([bias, wanted, other])


def test_images_keep_their_channels_innermost() -> None:
    g = GraphMaker()
    x = g.node("Transpose", g.input(torch.randn(2, 5, 6, 16)), perm=[0, 3, 1, 2])
    scale = g.input(torch.randn(2, 16, 1, 1))
    y = g.node("Transpose", g.node("Mul", g.node("Relu", x), scale), perm=[0, 2, 3, 1])
    program = g.check(y)
    assert "copy" not in [step.kernel_name for step in program.tape.steps[:-1]]


def test_neighbours_become_one_step(isa: str) -> None:
    g = GraphMaker()
    x, y = g.input(torch.randn(3, 5, 300)), g.input(torch.randn(5, 1))
    a = g.node("Add", g.node("Mul", x, y), g.node("Sigmoid", x))
    z = g.node("Sub", g.node("Tanh", a), g.node("Relu", g.node("Neg", x)))
    assert len(g.check(z).tape.steps) == 1


def test_a_chain_that_is_too_long_is_cut(isa: str) -> None:
    g = GraphMaker()
    x = g.input(torch.randn(2, 70))
    y = x
    for k in range(60):
        y = g.node("Add", g.node("Mul", y, torch.tensor(0.5 + k / 100)), g.input(torch.randn(70)))
    program = g.check(y)
    assert 3 <= len(program.tape.steps) < 60


def test_what_python_reads_is_computed_before(isa: str) -> None:
    g = GraphMaker()
    x = g.input(torch.rand(4, 6))
    odd = g.node("Mod", g.node("Mul", x, torch.tensor(3.0)), torch.tensor(2.0), fmod=1)
    program = g.check(
        g.node("Add", g.node("Relu", odd), g.node("Acosh", g.node("Add", x, torch.tensor(1.0)))), native=False
    )
    assert {node.op for node in program.python_nodes} == {"Mod", "Acosh"}
