"""ONNX models with something wrong: well-formed files that say something else, and damaged bytes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.graph.models import model, node, weights

EXTREMES = (0, -1, 1, 2, 3, 7, -7, 1 << 20, 1 << 31, -(1 << 31), 1 << 40, 1 << 62, -(1 << 63), (1 << 63) - 1)
OPERATORS = sorted({schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""})
ATTRIBUTES = (
    *("pads", "axis", "group", "kernel_shape", "strides", "dilations", "perm", "to", "keepdims", "axes", "epsilon"),
    *("mode", "blocksize", "hidden_size", "direction", "num_outputs", "ceil_mode", "allowzero", "output_shape"),
)


def whole(*numbers: int) -> Any:
    return np.array(numbers, np.int64)


def convolutions() -> onnx.ModelProto:
    nodes = [
        node("Conv", "x w b", "c", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("BatchNormalization", "c s b m v", "n"),
        node("Relu", "n", "r"),
        node("MaxPool", "r", "q", kernel_shape=[2, 2], strides=[2, 2]),
        node("GlobalAveragePool", "q", "p"),
        node("Flatten", "p", "f"),
        node("Gemm", "f k l", "y", transB=1),
    ]
    parameters = {"w": weights(4, 3, 3, 3), "v": weights(4) ** 2 + 1, "k": weights(5, 4), "l": weights(5)}
    return model(nodes, {"x": [1, 3, 8, 8]}, ["y"], parameters | {name: weights(4) for name in "bsm"})


def attention() -> onnx.ModelProto:
    nodes = []
    for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes.append(node("MatMul", f"x w{name}", f"a{name}"))
        nodes.append(node("Reshape", f"a{name} heads", f"b{name}"))
        nodes.append(node("Transpose", f"b{name}", name, perm=perm))
    nodes += [
        node("MatMul", "q k", "s"),
        node("Mul", "s half", "t"),
        node("Softmax", "t", "p", axis=-1),
        node("MatMul", "p v", "o"),
        node("Transpose", "o", "u", perm=[0, 2, 1, 3]),
        node("Reshape", "u flat", "z"),
        node("LayerNormalization", "z g g", "y", axis=-1),
    ]
    parameters = {"heads": whole(0, 0, 2, 4), "flat": whole(0, 0, 8), "half": np.float32(0.5), "g": weights(8)}
    return model(nodes, {"x": ["n", 4, 8]}, ["y"], parameters | {f"w{name}": weights(8, 8) for name in "qkv"})


def shapes() -> onnx.ModelProto:
    """Arithmetic on shapes, and what takes sizes as inputs."""
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s zero", "g"),
        node("Unsqueeze", "g axis0", "u"),
        node("Concat", "u rest", "t", axis=0),
        node("Reshape", "x t", "r"),
        node("Slice", "r starts ends", "a"),
        node("Pad", "a pads", "b"),
        node("Tile", "b times", "c"),
        node("Expand", "c wide", "d"),
        node("Resize", "x . . sizes", "z", mode="linear"),
        node("TopK", "d two", "e f"),
        node("ReduceSum", "e axis1", "y", keepdims=0),
        node("Split", "x parts", "h i", axis=1),
        node("Concat", "h i", "j", axis=1),
        node("Gather", "j places", "k", axis=1),
        node("Range", "zero five one", "l"),
        node("ConstantOfShape", "wide", "m"),
    ]
    sizes = {"zero": np.int64(0), "five": np.int64(5), "one": np.int64(1), "axis0": whole(0), "axis1": whole(1)}
    sizes |= {"rest": whole(-1), "starts": whole(0, 1), "ends": whole(2, 9), "pads": whole(0, 1, 0, 1)}
    sizes |= {"times": whole(1, 2), "wide": whole(1, 2, 1), "sizes": whole(2, 4, 9), "two": whole(2)}
    sizes |= {"parts": whole(1, 3), "places": whole(0, 2, 3)}
    return model(nodes, {"x": [2, 4, 6]}, ["y", "z", "k", "m"], sizes)


def control() -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    branches = {
        key: helper.make_graph([node(op, "x", name)], key, [], [value(name, TensorProto.FLOAT, None)])
        for key, op, name in (("then_branch", "Relu", "t"), ("else_branch", "Neg", "e"))
    }
    body = helper.make_graph(
        [node("Add", "acc x", "next"), node("Identity", "before", "after"), node("Identity", "next", "row")],
        "body",
        [
            value("i", TensorProto.INT64, []),
            value("before", TensorProto.BOOL, []),
            value("acc", TensorProto.FLOAT, None),
        ],
        [value("after", TensorProto.BOOL, [])] + [value(name, TensorProto.FLOAT, None) for name in ("next", "row")],
    )
    nodes = [node("If", "yes", "z", **branches), node("Loop", "count yes z", "y rows", body=body)]
    return model(nodes, {"x": [3]}, ["y", "rows"], {"yes": np.array(True), "count": np.int64(4)})


def recurrent() -> onnx.ModelProto:
    parameters = {"w": weights(1, 20, 4), "r": weights(1, 20, 5), "b": weights(1, 40)}
    return model([node("LSTM", "x w r b", "y h c", hidden_size=5)], {"x": [3, 2, 4]}, ["y", "h"], parameters)


def quantised() -> onnx.ModelProto:
    nodes = [
        node("QuantizeLinear", "x s z", "a"),
        node("DequantizeLinear", "a s z", "b"),
        node("DequantizeLinear", "w ws wz", "c", axis=0),
        node("Conv", "b c", "d"),
        node("QuantizeLinear", "d s z", "e"),
        node("DequantizeLinear", "e s z", "y"),
    ]
    scales = {"s": np.float32(0.05), "z": np.int8(0), "ws": np.full(4, 0.1, np.float32), "wz": np.zeros(4, np.int8)}
    return model(nodes, {"x": [1, 3, 5, 5]}, ["y"], scales | {"w": np.ones((4, 3, 3, 3), np.int8)})


def functions() -> onnx.ModelProto:
    body = [helper.make_node("Add", ["a", "b"], ["t"]), helper.make_node("Relu", ["t"], ["o"])]
    calls = [
        helper.make_node("F", ["x", "k"], ["m"], domain="own"),
        helper.make_node("F", ["m", "x"], ["y"], domain="own"),
    ]
    made = model(calls, {"x": [4]}, ["y"], {"k": weights(4)})
    made.functions.append(helper.make_function("own", "F", ["a", "b"], ["o"], body, [helper.make_opsetid("", 17)]))
    made.opset_import.append(helper.make_opsetid("own", 1))
    return made


MODELS = tuple(make() for make in (convolutions, attention, shapes, control, recurrent, quantised, functions))


def mutated(seed: int) -> onnx.ModelProto | bytes:
    """One of the models with some changes: to what it says, or to its bytes."""
    rng = random.Random(seed)
    made = onnx.ModelProto()
    made.CopyFrom(rng.choice(MODELS))
    if rng.random() < 0.2:
        return _other_bytes(rng, made.SerializeToString())
    for _ in range(rng.randint(1, 3)):
        _change(rng, made)
    return made


def _other_bytes(rng: random.Random, given: bytes) -> bytes:
    data = bytearray(given)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data))
        kind = rng.randrange(5)
        if kind == 0:
            del data[place:]
            data = data or bytearray(b"\0")
        elif kind == 1:
            data[place] = rng.randrange(256)
        elif kind == 2:
            data[place:place] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
        elif kind == 3:
            data[place:place] = data[max(place - rng.randint(1, 200), 0) : place]
        elif len(data) > 40:
            del data[place : place + rng.randint(1, 30)]
    return bytes(data)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for item in graph.node:
        for attribute in item.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _change(rng: random.Random, made: onnx.ModelProto) -> None:
    graph = rng.choice(list(_graphs(made.graph)))
    names = [name for item in graph.node for name in item.output]
    names += [item.name for item in (*graph.initializer, *graph.input)] + ["", "nobody"]
    kind = rng.randrange(4)
    if kind == 0 and graph.initializer:
        _change_weight(rng, rng.choice(graph.initializer))
    elif kind == 1:
        _change_interface(rng, made, graph, names)
    elif graph.node:
        _change_node(rng, graph, rng.choice(graph.node), names)


def _change_weight(rng: random.Random, weight: TensorProto) -> None:
    kind = rng.randrange(5)
    if kind == 0:
        weight.data_type = rng.randrange(-1, 28)
    elif kind == 1:
        dims = [*weight.dims, rng.choice(EXTREMES)] if rng.random() < 0.3 or not weight.dims else list(weight.dims)
        dims[rng.randrange(len(dims))] = rng.choice(EXTREMES)
        weight.dims[:] = dims
    elif kind == 2:
        weight.raw_data = bytes(rng.randrange(256) for _ in range(rng.choice([0, 1, 3, 8, 400])))
    elif kind == 3:
        weight.name = rng.choice(["x", "y", "", "nobody"])
    elif weight.data_type == TensorProto.INT64 and len(weight.raw_data) == 8 * math.prod(weight.dims) > 0:
        array = numpy_helper.to_array(weight).copy()
        array.reshape(-1)[rng.randrange(array.size)] = rng.choice(EXTREMES)
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))


def _change_interface(rng: random.Random, made: onnx.ModelProto, graph: onnx.GraphProto, names: list[str]) -> None:
    kind = rng.randrange(5)
    if kind == 0:
        made.opset_import[0].version = rng.choice([-1, 0, 1, 7, 11, 13, 18, 25, 26, 999])
    elif kind == 1 and graph.input:
        rng.choice(graph.input).type.tensor_type.elem_type = rng.randrange(28)
    elif kind == 2 and graph.input:
        dims = rng.choice(graph.input).type.tensor_type.shape.dim
        if dims:
            rng.choice(dims).dim_value = rng.choice(EXTREMES)
    elif kind == 3:
        rng.choice(graph.output).name = rng.choice(names)
    else:
        order = list(graph.node)
        rng.shuffle(order)
        del graph.node[:]
        graph.node.extend(order)


def _change_node(rng: random.Random, graph: onnx.GraphProto, item: onnx.NodeProto, names: list[str]) -> None:
    kind = rng.randrange(9)
    if kind == 0:
        item.op_type = rng.choice(OPERATORS)
    elif kind == 1 and item.input:
        item.input[rng.randrange(len(item.input))] = rng.choice(names)
    elif kind == 2:
        item.output[rng.randrange(len(item.output))] = rng.choice(names)
    elif kind == 3:
        value: Any = rng.choice([rng.choice(EXTREMES), [rng.choice(EXTREMES)] * rng.randint(1, 5), 2.5, "text", [1.5]])
        item.attribute.append(helper.make_attribute(rng.choice(ATTRIBUTES), value))
    elif kind == 4 and item.attribute:
        attribute = rng.choice(item.attribute)
        attribute.ints[:] = [rng.choice([*attribute.ints, *EXTREMES]) for _ in attribute.ints]
        attribute.i = rng.choice(EXTREMES)
        attribute.f = rng.choice([0.0, -1.0, float("inf"), float("nan")])
    elif kind == 5:
        graph.node.append(item)
    elif kind == 6:
        graph.node.remove(item)
    elif kind == 7 and item.input:
        del item.input[-1]
    else:
        item.input.append(rng.choice(names))
