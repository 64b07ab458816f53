"""Torch modules and exported programs into plans."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trine.graph as tg
from trine.core.errors import ConfigurationError


class Net(nn.Module):
    """With an operator that the tracing exporter can't write, where `diff` says so."""

    def __init__(self, diff: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.diff = nn.Linear(8, 4), diff

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.layer(x))
        return torch.diff(y, dim=1) if self.diff else y


@pytest.mark.parametrize("diff", [False, True])
def test_a_module(diff: bool) -> None:
    if diff:
        pytest.importorskip("onnxscript")
    net, x = Net(diff).eval(), torch.randn(3, 8)
    plan = tg.build(net, args=(x,), tune=False)
    (result,) = plan.run({plan.graph.inputs[0].name: x}).values()
    torch.testing.assert_close(torch.from_numpy(result), net(x).detach())


def test_an_exported_program_keeps_its_open_dimensions() -> None:
    pytest.importorskip("onnxscript")
    net = Net().eval()
    program = torch.export.export(net, (torch.randn(3, 8),), dynamic_shapes={"x": {0: torch.export.Dim("rows")}})
    plan = tg.build(program, tune=False)
    for rows in (2, 7):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(torch.from_numpy(next(iter(plan.run({"x": x}).values()))), net(x).detach())


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigurationError, match="needs args"):
        tg.build(Net())


def test_a_module_that_does_not_take_its_arguments() -> None:
    with pytest.raises(ConfigurationError, match="torch can't"):
        tg.build(Net(), args=(torch.randn(3, 9),))
