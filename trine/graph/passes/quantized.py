"""Quantised operators out of models with scales: what stands between DequantizeLinear and QuantizeLinear.

Both explicit models (exporters write the pairs) and the compiler's own quantisation take this way. A pair is folded
only where the quantised operator means the same; whatever else a model does with its pairs is left as it is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, prod

import torch

from trine.graph.dtypes import DType
from trine.graph.ir import Graph, Node, Value, constant
from trine.graph.passes.convolution import activation_of
from trine.graph.passes.pattern import remove_unread, replace_node
from trine.graph.runtime import bind

_BYTES = (DType.UINT8, DType.INT8)
_LARGEST_DEPTH = (1 << 31) // (255 * 128) - 1
"""Products that an int32 can sum."""
_REARRANGE = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "DepthToSpace", "SpaceToDepth")
_KEEPS_VALUES = frozenset(["MaxPool", "Slice", "Concat", "Expand", "Gather", "Tile", *_REARRANGE])
"""Operators whose results are some of their inputs' values: they do the same to integers."""


@dataclass(frozen=True)
class Scale:
    """An integer q of `dtype` stands for (q - zero) * scale."""

    scale: float
    zero: int
    dtype: DType


def link_quantized_weights(graph: Graph) -> Graph:
    """MatMul and Gemm by a dequantised constant matrix as Linear, so that bias, sum and activation join it."""
    for node in list(graph.nodes):
        for subgraph in node.subgraphs:
            link_quantized_weights(subgraph)
        if node.op in ("MatMul", "Gemm") and len(node.inputs) >= 2:
            _link(graph, node)
    return graph


def _link(graph: Graph, node: Node) -> None:
    x, w = node.inputs[:2]
    found = None if w is None else _weight(w)
    if x is None or w is None or found is None or w.rank != 2 or (x.rank or 2) < 2 or x.dtype is not DType.FLOAT32:
        return
    bias, a = node.input(2), node.attributes
    if node.op == "Gemm" and (a.get("alpha", 1.0) != 1 or a.get("beta", 1.0) != 1 or a.get("transA", 0)):
        return
    turn = not (node.op == "Gemm" and a.get("transB", 0))
    data, scales = found
    if scales.numel() > 1 and scales.shape[1 if turn else 0] == 1:
        return  # a scale for each input column can't leave the sum
    size = data.shape[1 if turn else 0]
    if bias is not None and bias.shape != (size,):
        return
    if turn:
        w = _dequantized(graph, node, f"{w.name}.T", data.T.contiguous(), scales.T.reshape(-1).contiguous())
    replace_node(graph, node, Node("Linear", [x, w, bias], [], {"activation": ""}, node.name))


def _dequantized(graph: Graph, node: Node, name: str, data: torch.Tensor, scales: torch.Tensor) -> Value:
    """A new DequantizeLinear of int8 constants before `node`, with a scale for each row."""
    name = f"{name}.{len(graph.nodes)}"
    value = Value(name, DType.FLOAT32, tuple(data.shape))
    inputs: list[Value | None] = [constant(f"{name}.integers", data), constant(f"{name}.scale", scales)]
    axis = {"axis": 0} if scales.numel() > 1 else {}
    made = Node("DequantizeLinear", inputs, [value], axis, name)
    if scales.numel() == 1:
        made.inputs[1] = constant(f"{name}.scale", scales.reshape(()))
    graph.nodes.insert(graph.nodes.index(node), made)
    return value


def scale_of(node: Node | None, op: str) -> Scale | None:
    """The one scale of a QuantizeLinear or DequantizeLinear of 8-bit integers; None for any other."""
    if node is None or node.op != op or node.attributes.get("block_size", 0) or node.attributes.get("precision", 0):
        return None
    scale, zero = node.input(1), node.input(2)
    if scale is None or not scale.is_constant or scale.dtype is not DType.FLOAT32 or scale.data.numel() != 1:
        return None
    if zero is not None and (not zero.is_constant or zero.data.numel() != 1):
        return None
    integers = node.output if op == "QuantizeLinear" else node.input(0)
    dtype = None if integers is None else integers.dtype
    if dtype not in _BYTES or dtype is None or (zero is not None and zero.dtype is not dtype):
        return None
    real = node.input(0) if op == "QuantizeLinear" else node.output
    size = float(scale.data.reshape(()))
    if real is None or real.dtype is not DType.FLOAT32 or not isfinite(size) or size <= 0:
        return None
    return Scale(size, 0 if zero is None else int(zero.data.reshape(())), dtype)


def _integers(value: Value | None) -> tuple[Value, Scale] | None:
    """The 8-bit integers that `value` is dequantised from."""
    node = None if value is None else value.producer
    found = scale_of(node, "DequantizeLinear")
    if node is None or found is None or node.inputs[0] is None:
        return None
    return node.inputs[0], found


def _weight(value: Value) -> tuple[torch.Tensor, torch.Tensor] | None:
    """int8 data and float32 scales (of one element, or to broadcast along one axis) of a dequantised constant."""
    node = value.producer
    if node is None or node.op != "DequantizeLinear" or node.attributes.get("block_size", 0):
        return None
    source, scale, zero = node.inputs[0], node.input(1), node.input(2)
    if source is None or scale is None or not source.is_constant or not scale.is_constant:
        return None
    if source.dtype not in _BYTES or scale.dtype is not DType.FLOAT32 or value.dtype is not DType.FLOAT32:
        return None
    data = source.data.to(torch.int32)
    spread = [1] * data.dim()
    if scale.data.numel() > 1:
        axis = node.attributes.get("axis", 1)
        if not -data.dim() <= axis < data.dim() or scale.data.numel() != data.shape[axis]:
            return None
        spread[axis] = -1
    if zero is not None:
        if not zero.is_constant or zero.data.numel() not in (1, scale.data.numel()):
            return None
        shift = zero.data.to(torch.int32)
        data = data - (shift.reshape(()) if shift.numel() == 1 else shift.reshape(spread))
    if data.numel() and (int(data.min()) < -128 or int(data.max()) > 127):
        return None
    return data.to(torch.int8), scale.data.reshape(spread)


def fuse_quantized(graph: Graph) -> Graph:
    """Fold DequantizeLinear into what reads it and QuantizeLinear into what makes its input."""
    for node in graph.nodes:
        for subgraph in node.subgraphs:
            fuse_quantized(subgraph)
    for node in list(graph.nodes):
        if node.op in ("FusedConv", "Linear"):
            _fold_product(graph, node)
        elif node.op == "GlobalAveragePool":
            _fold_average(graph, node)
    for node in list(graph.nodes):
        if node.op == "Add":
            _fold_add(graph, node)
    _fold_outputs(graph)
    for node in list(graph.nodes):
        if node.op in _KEEPS_VALUES:
            _keep_integers(graph, node)
    _drop_pairs(graph)
    _dequantize_constants(graph)
    remove_unread(graph)
    return graph


def _fold_product(graph: Graph, node: Node) -> None:
    found = _integers(node.inputs[0])
    w = node.inputs[1]
    weight = None if w is None else _weight(w)
    if found is None or weight is None:
        return
    data, scales = weight
    filters = data.shape[0]
    if scales.numel() > 1 and scales.shape[0] != filters:
        return
    if prod(data.shape[1:]) > _LARGEST_DEPTH:
        return
    bias = node.input(2)
    bias_data = None if bias is None else _constant_of(bias)
    if bias is not None and (bias_data is None or bias_data.shape != (filters,)):
        return
    x, source = found
    scale = (scales.reshape(-1).double() * source.scale).float().expand(filters).contiguous()
    residual, attributes = node.input(3), dict(node.attributes)
    known = _integers(residual)
    if known is not None:
        residual = known[0]
        attributes |= {"residual_scale": known[1].scale, "residual_zero": known[1].zero}
    elif residual is not None and residual.dtype is not DType.FLOAT32:
        return
    name = node.output.name
    inputs: list[Value | None] = [
        x,
        constant(f"{name}.weight", data.contiguous()),
        constant(f"{name}.scale", scale),
        None if bias_data is None else constant(f"{name}.bias", bias_data),
        residual,
    ]
    op = "QuantizedConv" if node.op == "FusedConv" else "QuantizedLinear"
    replace_node(graph, node, Node(op, inputs, [], {**attributes, "x_zero": source.zero}, node.name))


def _constant_of(value: Value) -> torch.Tensor | None:
    """Float32 data of a constant, or of the integers it is dequantised from."""
    if value.is_constant:
        return value.data if value.dtype is DType.FLOAT32 else None
    node = value.producer
    if node is None or node.op != "DequantizeLinear" or node.attributes.get("block_size", 0):
        return None
    if not all(given is None or given.is_constant for given in node.inputs) or value.dtype is not DType.FLOAT32:
        return None
    kernel, _ = bind(node)
    made: torch.Tensor = kernel(*(None if given is None else given.data for given in node.inputs))
    return made


def _fold_average(graph: Graph, node: Node) -> None:
    found = _integers(node.inputs[0])
    if found is None or node.output.rank != 4:
        return
    x, scale = found
    attributes = {"x_scale": scale.scale, "x_zero": scale.zero}
    replace_node(graph, node, Node("QuantizedGlobalAveragePool", [x], [], attributes, node.name))


def _fold_add(graph: Graph, node: Node) -> None:
    """A sum of integers, with the activation after it, where the result is quantised."""
    found = [_integers(value) for value in node.inputs]
    if len(found) != 2 or found[0] is None or found[1] is None:
        return
    last, activation = node, ""
    readers = graph.users().get(node.output, [])
    if len(readers) == 1 and node.output not in graph.outputs and readers[0] in graph.nodes:
        activation = activation_of(readers[0])
        last = readers[0] if activation and readers[0].inputs[0] is node.output else node
    activation = activation if last is not node else ""
    scale = _quantized_by(graph, last.output)
    if scale is None:
        return
    (a, first), (b, second) = found[0], found[1]
    attributes = {
        "activation": activation,
        **{"a_scale": first.scale, "a_zero": first.zero, "b_scale": second.scale, "b_zero": second.zero},
        **_result(scale),
    }
    _give_integers(graph, last, Node("QuantizedAdd", [a, b], [], attributes, node.name), scale)


def _result(scale: Scale) -> dict[str, float | int | str]:
    return {"y_scale": scale.scale, "y_zero": scale.zero, "y_dtype": str(scale.dtype)}


def _quantized_by(graph: Graph, value: Value) -> Scale | None:
    """The scale with which every reader of `value` quantises it; None if they differ, or one reads it as it is."""
    readers = graph.users().get(value, [])
    scales = {scale_of(reader, "QuantizeLinear") for reader in readers}
    if value in graph.outputs or len(scales) != 1 or any(reader.inputs[0] is not value for reader in readers):
        return None
    return scales.pop()


def _give_integers(graph: Graph, last: Node, made: Node, scale: Scale) -> None:
    """`made` takes the place of `last` and of the QuantizeLinear nodes that read it."""
    quantizers = [reader for reader in graph.users().get(last.output, []) if reader.op == "QuantizeLinear"]
    shape = last.output.shape
    replace_node(graph, last, made)
    first, *others = quantizers
    made.outputs = [first.output]
    first.output.producer, first.output.shape, first.output.dtype = made, shape, scale.dtype
    for other in others:
        graph.replace(other.output, first.output)
    graph.nodes[:] = [node for node in graph.nodes if node not in quantizers]


def _fold_outputs(graph: Graph) -> None:
    """Quantised nodes give integers where those are all that is read."""
    for node in list(graph.nodes):
        if node.op not in ("QuantizedConv", "QuantizedLinear", "QuantizedGlobalAveragePool"):
            continue
        if node.attributes.get("y_dtype", DType.FLOAT32) != DType.FLOAT32:
            continue
        last, inputs = node, list(node.inputs)
        readers = graph.users().get(node.output, [])
        if node.op == "QuantizedLinear" and len(readers) == 1 and node.output not in graph.outputs:
            columns = _columns(readers[0], node.output)
            if columns is not None:
                last, inputs = readers[0], [*inputs, *[None] * (5 - len(inputs)), columns]
        scale = _quantized_by(graph, last.output)
        if scale is not None:
            attributes = {**node.attributes, **_result(scale)}
            _give_integers(graph, last, Node(node.op, inputs, [], attributes, node.name), scale)


def _columns(node: Node, value: Value) -> Value | None:
    """A constant for each column of `value` that the node multiplies it by."""
    if node.op != "Mul" or value.shape is None or node.output.shape != value.shape:
        return None
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    if other is None or not other.is_constant or other.dtype is not DType.FLOAT32 or other.shape != value.shape[-1:]:
        return None
    return other


def _keep_integers(graph: Graph, node: Node) -> None:
    """An operator that moves values, on integers, where it lies between pairs of one scale."""
    if sum(bool(value.name) for value in node.outputs) != 1 or not node.outputs[0].name:
        return
    count = len(node.inputs) if node.op == "Concat" else 1
    found = [_integers(value) for value in node.inputs[:count]]
    scale = _quantized_by(graph, node.output)
    if scale is None or any(pair is None or pair[1] != scale for pair in found):
        return
    inputs = [pair[0] for pair in found if pair is not None]
    _give_integers(graph, node, Node(node.op, [*inputs, *node.inputs[count:]], [], node.attributes, node.name), scale)


def _pairs(graph: Graph) -> Iterator[tuple[Node, Value]]:
    """QuantizeLinear nodes that undo a DequantizeLinear, with the integers."""
    for node in graph.nodes:
        scale, found = scale_of(node, "QuantizeLinear"), _integers(node.input(0))
        if scale is not None and found is not None and found[1] == scale:
            yield node, found[0]


def _drop_pairs(graph: Graph) -> None:
    for node, integers in list(_pairs(graph)):
        if node.output not in graph.outputs:
            graph.replace(node.output, integers)


def _dequantize_constants(graph: Graph) -> None:
    """What is left of dequantised float32 constants is computed now, for the kernels that want constants."""
    for node in list(graph.nodes):
        if node.op != "DequantizeLinear" or node.output in graph.outputs:
            continue
        data = _constant_of(node.output)
        if data is not None:
            graph.replace(node.output, constant(node.output.name, data))
            graph.nodes.remove(node)
