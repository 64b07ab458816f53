"""Random valid ONNX models: shapes, broadcasts, patterns that passes look for, axes that are open."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = tuple[int, ...]


class Generator:
    """Adds random nodes to what it has; every value's concrete shape is known, so that each node is valid."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.arrays = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray[Any, Any]] = {}
        self.shapes: dict[str, Shape] = {}
        self.inputs: dict[str, Shape] = {}
        self.count = 0

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def input(self, shape: Shape) -> str:
        name = self.name()
        self.inputs[name] = self.shapes[name] = shape
        return name

    def weight(self, array: Any) -> str:
        name = self.name()
        self.weights[name] = np.asarray(array)
        return name

    def floats(self, *shape: int) -> str:
        return self.weight((self.arrays.standard_normal(shape) * 0.5).astype(np.float32))

    def ints(self, *numbers: int) -> str:
        return self.weight(np.array(numbers, np.int64))

    def node(self, op: str, inputs: list[str], shape: Shape, **attributes: Any) -> str:
        name = self.name()
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        self.shapes[name] = shape
        return name

    def pick(self, test: Callable[[Shape], bool] = lambda shape: True) -> str | None:
        fitting = [name for name, shape in self.shapes.items() if test(shape)]
        return self.rng.choice(fitting[-6:]) if fitting else None

    def step(self) -> None:
        """One more node, or pattern of nodes, if what is there allows the kind that was drawn."""
        self.rng.choice(KINDS)(self)

    def model(self, open_batch: bool) -> tuple[onnx.ModelProto, dict[str, np.ndarray[Any, Any]]]:
        """The model, which returns what nobody reads, and inputs for it; `open_batch` names each first axis."""
        read = {name for node in self.nodes for name in node.input}
        ends = [name for name in self.shapes if name not in read and name not in self.inputs]
        ends = ends or [list(self.shapes)[-1]]
        if self.rng.random() < 0.2:
            ends.append(self.rng.choice([name for name in self.shapes if name not in ends] or ends))
        graph = helper.make_graph(
            self.nodes,
            "random",
            [
                helper.make_tensor_value_info(
                    name, TensorProto.FLOAT, [f"n_{name}" if open_batch and i == 0 else d for i, d in enumerate(shape)]
                )
                for name, shape in self.inputs.items()
            ],
            [
                onnx.ValueInfoProto(
                    name=name, type=onnx.TypeProto(tensor_type=onnx.TypeProto.Tensor(elem_type=TensorProto.FLOAT))
                )
                for name in dict.fromkeys(ends)
            ],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.rng.choice([13, 15, 17]))])
        made.ir_version = 9
        given = {name: self.arrays.standard_normal(shape).astype(np.float32) for name, shape in self.inputs.items()}
        return made, given


def unary(g: Generator) -> None:
    x = g.pick()
    assert x is not None
    op, attributes = g.rng.choice(
        [
            ("Relu", {}), ("Sigmoid", {}), ("Tanh", {}), ("Erf", {}), ("Abs", {}), ("Neg", {}), ("Softplus", {}),
            ("LeakyRelu", {"alpha": 0.2}), ("Elu", {"alpha": 0.7}), ("HardSigmoid", {}), ("Identity", {}),
            ("Sin", {}),
            ("Selu", {}), ("Cos", {}), ("Softsign", {}), ("Celu", {"alpha": 0.5}), ("ThresholdedRelu", {}),
        ]
    )  # fmt: skip
    g.node(op, [x], g.shapes[x], **attributes)


def binary(g: Generator) -> None:
    """With a value of the same shape, or a weight that broadcasts, on either side."""
    x = g.pick()
    assert x is not None
    shape = g.shapes[x]
    other = g.pick(lambda s: s == shape) if g.rng.random() < 0.5 else None
    if other is None:
        kept = g.rng.randint(0, len(shape))
        small = tuple(d if g.rng.random() < 0.6 else 1 for d in shape[len(shape) - kept :])
        other = g.weight(np.float32(g.rng.choice([0, 1, 2, -0.5]))) if g.rng.random() < 0.2 else g.floats(*small)
    pair = [x, other] if g.rng.random() < 0.6 else [other, x]
    op = g.rng.choice(["Add", "Mul", "Sub", "Max", "Min"])
    if op == "Sub" or len(pair) == 2:
        g.node(op, pair, shape)


def linear(g: Generator) -> None:
    x = g.pick(lambda s: len(s) >= 2)
    if x is None:
        return
    shape, n = g.shapes[x], g.rng.choice([1, 3, 8, 16])
    if len(shape) == 2 and g.rng.random() < 0.5:
        turned = g.rng.random() < 0.5
        w = g.floats(n, shape[1]) if turned else g.floats(shape[1], n)
        bias = [g.floats(*g.rng.choice([(n,), (1, n), (1,), ()]))] if g.rng.random() < 0.7 else []
        alpha = g.rng.choice([1.0, 1.0, 0.5])
        y = g.node("Gemm", [x, w, *bias], (shape[0], n), transB=int(turned), alpha=alpha, beta=g.rng.choice([1.0, 2.0]))
    else:
        y = g.node("MatMul", [x, g.floats(shape[-1], n)], (*shape[:-1], n))
        if g.rng.random() < 0.6:
            y = g.node("Add", [y, g.floats(n)] if g.rng.random() < 0.5 else [g.floats(n), y], (*shape[:-1], n))
    follow(g, y)


def follow(g: Generator, y: str) -> None:
    """Perhaps a residual and an activation, which fusions take in; sometimes the middle is read elsewhere, too."""
    shape = g.shapes[y]
    if g.rng.random() < 0.4:
        other = g.pick(lambda s: s == shape)
        assert other is not None
        y = g.node("Add", [y, other] if g.rng.random() < 0.5 else [other, y], shape)
    if g.rng.random() < 0.15:
        g.node("Neg", [y], shape)
    kind = g.rng.randrange(6)
    if kind == 0:
        g.node("Relu", [y], shape)
    elif kind == 1:
        g.node("Clip", [y, g.weight(np.float32(0)), g.weight(np.float32(6))], shape)
    elif kind == 2:
        g.node("Mul", [y, g.node("Sigmoid", [y], shape)], shape)
    elif kind == 3:
        gelu(g, y)


def gelu(g: Generator, x: str | None = None) -> None:
    x = x or g.pick()
    assert x is not None
    shape = g.shapes[x]
    scaled = g.node("Div", [x, g.weight(np.float32(np.sqrt(2)))], shape)
    inner = g.node("Add", [g.node("Erf", [scaled], shape), g.weight(np.float32(1))], shape)
    g.node("Mul", [g.node("Mul", [x, inner], shape), g.weight(np.float32(0.5))], shape)


def convolution(g: Generator) -> None:
    x = g.pick(lambda s: len(s) == 4 and min(s[2:]) >= 3)
    if x is None:
        return
    n, c, h, w = g.shapes[x]
    k, stride, dilation = g.rng.choice([1, 3]), g.rng.choice([1, 1, 2]), g.rng.choice([1, 1, 2])
    group = c if g.rng.random() < 0.3 else 1
    filters = c if group > 1 or g.rng.random() < 0.5 else g.rng.choice([1, 4, 8])
    pads = [g.rng.choice([0, k // 2, 1]) for _ in range(4)] if g.rng.random() < 0.2 else [k // 2 * dilation] * 4
    size = [(s + pads[i] + pads[i + 2] - (k - 1) * dilation - 1) // stride + 1 for i, s in enumerate((h, w))]
    if min(size) < 1:
        return
    shape = (n, filters, *size)
    bias = [g.floats(filters)] if g.rng.random() < 0.6 else []
    y = g.node(
        "Conv", [x, g.floats(filters, c // group, k, k), *bias], shape,
        strides=[stride] * 2, pads=pads, dilations=[dilation] * 2, group=group, kernel_shape=[k, k],
    )  # fmt: skip
    if g.rng.random() < 0.5:
        scale, shift, mean = (g.floats(filters) for _ in range(3))
        variance = g.weight((g.arrays.random(filters) + 0.5).astype(np.float32))
        y = g.node("BatchNormalization", [y, scale, shift, mean, variance], shape)
    follow(g, y)


def pool(g: Generator) -> None:
    x = g.pick(lambda s: len(s) == 4 and min(s[2:]) >= 3)
    if x is None:
        return
    n, c, h, w = g.shapes[x]
    if g.rng.random() < 0.3:
        g.node(g.rng.choice(["GlobalAveragePool", "GlobalMaxPool"]), [x], (n, c, 1, 1))
        return
    k, stride, pad = g.rng.choice([2, 3]), g.rng.choice([1, 2]), g.rng.choice([0, 1])
    size = [(s + 2 * pad - k) // stride + 1 for s in (h, w)]
    op = g.rng.choice(["MaxPool", "AveragePool"])
    extra = {"count_include_pad": g.rng.randrange(2)} if op == "AveragePool" else {}
    g.node(op, [x], (n, c, *size), kernel_shape=[k, k], strides=[stride] * 2, pads=[pad] * 4, **extra)


def normalise(g: Generator) -> None:
    x = g.pick(lambda s: len(s) >= 2 and s[-1] > 1)
    if x is None:
        return
    shape = g.shapes[x]
    row, d = (*shape[:-1], 1), shape[-1]
    if g.rng.random() < 0.3:
        g.node("Softmax", [x], shape, axis=g.rng.choice([-1, len(shape) - 1, 0]))
        return
    if g.rng.random() < 0.5:
        centred = g.node("Sub", [x, g.node("ReduceMean", [x], row, axes=[-1])], shape)
        square = g.node("Pow", [centred, g.weight(np.float32(2))], shape)
    else:
        centred, square = x, g.node("Mul", [x, x], shape)
    mean = g.node("ReduceMean", [square], row, axes=[-1])
    root = g.node("Sqrt", [g.node("Add", [mean, g.weight(np.float32(1e-5))], row)], row)
    y = g.node("Mul", [g.node("Div", [centred, root], shape), g.floats(d)], shape)
    if g.rng.random() < 0.7:
        g.node("Add", [y, g.floats(d)], shape)


def attention(g: Generator) -> None:
    x = g.pick(lambda s: len(s) == 3 and s[2] % 2 == 0)
    if x is None:
        return
    b, s, d = g.shapes[x]
    heads = g.rng.choice([1, 2])
    split = (b, s, heads, d // heads)
    parts = []
    for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
        y = g.node("MatMul", [x, g.floats(d, d)], (b, s, d))
        y = g.node("Reshape", [y, g.ints(0, 0, heads, d // heads)], split)
        parts.append(g.node("Transpose", [y], tuple(split[axis] for axis in perm), perm=perm))
    shape = (b, heads, s, s)
    scores = g.node("MatMul", parts[:2], shape)
    if g.rng.random() < 0.8:
        scores = g.node(g.rng.choice(["Mul", "Div"]), [scores, g.weight(np.float32(g.rng.choice([0.25, 2.0])))], shape)
    if g.rng.random() < 0.5:
        mask = g.floats(*g.rng.choice([(1, 1, s, s), (1, 1, 1, s), (s, s), (1,)]))
        scores = g.node("Add", [scores, mask] if g.rng.random() < 0.7 else [mask, scores], shape)
    y = g.node("MatMul", [g.node("Softmax", [scores], shape, axis=-1), parts[2]], (b, heads, s, d // heads))
    y = g.node("Transpose", [y], split, perm=[0, 2, 1, 3])
    g.node("Reshape", [y, g.ints(0, 0, d)], (b, s, d))


def restructure(g: Generator) -> None:
    x = g.pick(lambda s: len(s) >= 2)
    if x is None:
        return
    shape = g.shapes[x]
    kind = g.rng.randrange(7)
    if kind == 0:
        perm = g.rng.sample(range(1, len(shape)), len(shape) - 1)
        y = g.node("Transpose", [x], (shape[0], *(shape[a] for a in perm)), perm=[0, *perm])
        if g.rng.random() < 0.4:
            back = [0, *(perm.index(a) + 1 for a in range(1, len(shape)))]
            g.node("Transpose", [y], shape, perm=back)
    elif kind == 1:
        g.node("Reshape", [x, g.ints(0, -1)], (shape[0], int(np.prod(shape[1:]))))
    elif kind == 2:
        other = g.pick(lambda s: s == shape)
        assert other is not None
        g.node("Concat", [x, other], (shape[0], 2 * shape[1], *shape[2:]), axis=1)
    elif kind == 3 and shape[1] > 1:
        end = g.rng.randint(1, shape[1])
        g.node("Slice", [x, g.ints(0), g.ints(end), g.ints(1)], (shape[0], end, *shape[2:]))
    elif kind == 4:
        y = g.node("Unsqueeze", [x, g.ints(1)], (shape[0], 1, *shape[1:]))
        g.node("Squeeze", [y, g.ints(1)], shape)
    elif kind == 5 and len(shape) == 4:
        g.node("Pad", [x, g.ints(0, 0, 1, 0, 0, 0, 0, 2)], (*shape[:2], shape[2] + 1, shape[3] + 2))
    else:
        op = g.rng.choice(["ReduceMax", "ReduceMean", "ReduceMin"])
        g.node(op, [x], (*shape[:-1], 1), axes=[-1])


def shape_arithmetic(g: Generator) -> None:
    """A Reshape to what the shape of the value itself says, as exporters write it."""
    x = g.pick(lambda s: len(s) == 3)
    if x is None:
        return
    b, s, d = g.shapes[x]
    shape = g.node("Shape", [x], (3,))
    first = g.node("Gather", [shape, g.ints(0)], (1,), axis=0)
    second = g.node("Gather", [shape, g.ints(1)], (1,), axis=0)
    rest = g.node("Mul", [second, g.ints(d)], (1,))
    wanted = g.node("Concat", [first, rest], (2,), axis=0)
    for name in (shape, first, second, rest, wanted):
        del g.shapes[name]
    g.node("Reshape", [x, wanted], (b, s * d))


KINDS: list[Callable[[Generator], None]] = [
    unary, binary, linear, gelu, convolution, convolution, pool, normalise, attention, restructure, shape_arithmetic,
]  # fmt: skip


def random_model(seed: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray[Any, Any]]]:
    """A model of up to a dozen steps, and its inputs."""
    g = Generator(seed)
    batch = g.rng.choice([1, 2, 3])
    for _ in range(g.rng.choice([1, 1, 2])):
        g.input(g.rng.choice([(batch, 8), (batch, 5, 8), (batch, 4, 9, 7), (batch, 8, 6, 6), (batch, 3, 2)]))
    for _ in range(g.rng.randint(2, 12)):
        g.step()
    if not g.nodes:
        unary(g)
    return g.model(g.rng.random() < 0.4)
