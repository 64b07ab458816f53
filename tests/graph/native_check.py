"""Holds native kernels to the operators' own meaning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from trine.graph.dtypes import FROM_TORCH
from trine.graph.ir import Graph, Node, Value, constant
from trine.graph.native import NativeProgram, Packed
from trine.graph.runtime import Program
from trine.graph.shapes import infer_shapes
from trine.kernels.cpu.native import load

LIBRARY, _STATUS = load()
ISAS = [
    name
    for name in ("avx2", "avx512", "avx512_bf16", "amx", "emulated")
    if LIBRARY is not None and LIBRARY.trine_set_isa(name.encode()) == 0
]
"""Builds of the kernels that this processor runs."""
_BEST = next((name for name in ("amx", "avx512_bf16", "avx512", "avx2") if name in ISAS), None)
if LIBRARY is not None and _BEST is not None:
    LIBRARY.trine_set_isa(_BEST.encode())

needs_native = pytest.mark.skipif(not ISAS, reason="the native kernels are not built, or not for this processor")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every build of the kernels in turn."""
    assert LIBRARY is not None
    assert _BEST is not None
    LIBRARY.trine_set_isa(request.param.encode())
    yield request.param
    LIBRARY.trine_set_isa(_BEST.encode())


class GraphMaker:
    """Builds a graph of nodes by calls; constants are tensors given as operands."""

    def __init__(self) -> None:
        self.graph = Graph("test")
        self.arguments: list[torch.Tensor] = []
        self._count = 0

    def input(self, data: torch.Tensor) -> Value:
        value = Value(f"x{len(self.graph.inputs)}", FROM_TORCH[data.dtype], tuple(data.shape))
        self.graph.inputs.append(value)
        self.arguments.append(data)
        return value

    def node(self, op: str, *inputs: Value | torch.Tensor | None, outputs: int = 1, **attributes: Any) -> Any:
        values: list[Value | None] = []
        for given in inputs:
            if isinstance(given, torch.Tensor):
                self._count += 1
                given = constant(f"c{self._count}", given)
            values.append(given)
        self._count += 1
        made = [Value(f"v{self._count}_{k}") for k in range(outputs)]
        self.graph.nodes.append(Node(op, values, made, attributes, f"n{self._count}"))
        infer_shapes(self.graph)
        return made[0] if outputs == 1 else made

    def check(self, results: Sequence[Value] | Value, tolerance: float = 1e-5, *, native: bool = True) -> NativeProgram:
        """Run natively and by the operators' meaning; the two must agree. `native`: no node may need Python."""
        self.graph.outputs = list(results) if isinstance(results, Sequence) else [results]
        self.graph.output_names = [value.name for value in self.graph.outputs]
        self.graph.verify()
        expected = Program(self.graph).run(*self.arguments)
        program = NativeProgram(self.graph, Packed(self.graph))
        if native:
            assert [node.op for node in program.python_nodes] == []
        for _ in range(2):  # the second run finds the memory that the first left
            for value, got, want in zip(self.graph.outputs, program.run(*self.arguments), expected, strict=True):
                assert (got.shape, got.dtype) == (want.shape, want.dtype), value.name
                if want.is_floating_point():
                    scale = float(want[want.isfinite()].abs().max()) if want.isfinite().any() else 1.0
                    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
                else:
                    assert torch.equal(got, want), value.name
        return program
