"""TorchInductor over the whole lowered graph: one more candidate, on a graph that our passes have made better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from trine.graph.gpu import generic
from trine.graph.gpu.program import DeviceProgram
from trine.graph.gpu.registry import Kernel, Target, options
from trine.graph.ir import Graph, Node

NAME = "inductor"


def compiled(graph: Graph, inputs: Sequence[Any], target: Target, mode: str) -> Callable[..., Any]:
    """The graph as torch operations with its constants in it, compiled by Inductor for these inputs' shapes.

    Raises whatever the compiler raises, for example where an operator looks at its input's numbers.
    """
    from torch._inductor import compile as compile_graph
    from torch._inductor import list_mode_options
    from torch.fx.experimental.proxy_tensor import make_fx

    program = DeviceProgram(graph, torch_kernels(graph, target), target)
    with torch.no_grad():
        traced = make_fx(lambda *given: program.run(*given))(*inputs)
        function: Callable[..., Any] = compile_graph(traced, list(inputs), options=list_mode_options(mode))
        function(*inputs)
    return function


def torch_kernels(graph: Graph, target: Target) -> dict[Node, Kernel]:
    """For each node torch's own operations."""
    kernels: dict[Node, Kernel] = {}
    for node in graph.nodes:
        make = options(node, target).get("torch")
        kernels[node] = generic.kernel(node, target) if make is None else make()
    return kernels
