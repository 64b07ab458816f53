"""Products in float8 (e4m3): weights with a scale a channel, activations with one scale each, found by calibration.

Rounding rides on the kernel that makes the activation (layer norm, attention, or another product's epilogue), so that
it costs no pass of its own and halves what is written. An activation that something else reads, too, is written twice.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trine.graph.dtypes import DType
from trine.graph.gpu import tuning
from trine.graph.gpu.program import DeviceProgram
from trine.graph.gpu.registry import Kernel, Target
from trine.graph.ir import Graph, Node, Value, constant
from trine.graph.passes.pattern import insert_before
from trine.kernels import fp8

Scales = dict[str, float]
"""The largest magnitude seen of each value that a product reads, by the value's name."""

_WIDTH = 16
"""The matrix units take float8 operands in rows of a multiple of so many."""


def candidates(graph: Graph) -> list[Node]:
    """The linear layers that are worth float8: their sizes fit the matrix units."""
    return [
        node
        for node in graph.nodes
        if node.op == "Linear"
        and node.inputs[0] is not None
        and not node.inputs[0].is_constant
        and all(value is None or value.is_constant for value in node.inputs[1:3])
        and node.inputs[1] is not None
        and all(size % _WIDTH == 0 for size in node.inputs[1].data.shape)
    ]


def calibrate(graph: Graph, inputs: list[Any], target: Target, largest: Scales) -> None:
    """Raise `largest` to what the inputs of float8's candidates reach on these inputs."""
    wanted = {node: node.inputs[0] for node in candidates(graph)}
    program = DeviceProgram(graph, tuning.kernels_of(graph, {}, target), target)

    def see(node: Node, kernel: Kernel, given: list[Any]) -> Any:
        value = wanted.get(node)
        if value is not None and isinstance(given[0], Tensor):
            largest[value.name] = max(largest.get(value.name, 0.0), float(given[0].abs().max()))
        return kernel(*given)

    program.trace(inputs, see)


def to_fp8(graph: Graph, largest: Scales) -> Graph:
    """Linear layers with a calibrated input as Fp8Linear, their inputs rounded by what makes them where it can."""
    rounded: dict[Value, Value] = {}
    for node in candidates(graph):
        x, weight, bias = node.inputs[0], node.inputs[1], node.input(2)
        if x is None or weight is None or x.name not in largest or not largest[x.name]:
            continue
        scale = largest[x.name] / fp8.LARGEST
        if x not in rounded:
            rounded[x] = _rounded(graph, x, scale, node)
        packed = fp8.pack_fp8(weight.data.contiguous())
        inputs = [
            rounded[x],
            constant(f"{weight.name}.fp8", packed.values, DType.FLOAT8E4M3FN),
            constant(f"{weight.name}.scales", packed.scales),
            bias,
            node.input(3),
        ]
        outputs = list(node.outputs)
        fused = Node("Fp8Linear", inputs, outputs, {"scale": scale, "activation": node.attributes["activation"]})
        fused.name = node.name
        graph.nodes[graph.nodes.index(node)] = fused
    read = {*graph.users(), *graph.outputs}
    for node in graph.nodes:
        if node.op == "AddLayerNorm" and node.outputs[0] not in read:
            node.outputs[0].name = ""  # only the rounded one is wanted
    graph.verify()
    return graph


def _rounded(graph: Graph, x: Value, scale: float, reader: Node) -> Value:
    """x in float8: another output of a norm, the only one of attention or a product that nobody else reads."""
    maker, readers = x.producer, graph.users()[x]
    name = f"{x.name}.fp8"
    if maker is not None and maker.op == "AddLayerNorm" and x is maker.outputs[0]:
        maker.outputs[2] = Value(name, DType.FLOAT8E4M3FN, x.shape, producer=maker)
        maker.attributes["out_scale"] = scale
        return maker.outputs[2]
    alone = len(readers) == 1 and x not in graph.outputs
    if maker is not None and alone and maker.op in ("HeadsAttention", "Fp8Linear"):
        maker.outputs = [Value(name, DType.FLOAT8E4M3FN, x.shape, producer=maker)]
        maker.attributes["out_scale"] = scale
        return maker.outputs[0]
    node = Node("QuantizeFp8", [x], [Value(name, DType.FLOAT8E4M3FN, x.shape)], {"scale": scale})
    insert_before(graph, reader, node)
    return node.output
