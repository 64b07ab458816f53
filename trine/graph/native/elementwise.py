"""Elementwise operators as programs of the kernel `chain` (csrc/kernels/chain.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from math import prod

from trine.graph.dtypes import DType, from_onnx
from trine.graph.ir import Graph, Node, Value
from trine.graph.native.args import (
    ACTIVATIONS,
    CHAIN_BLOCK,
    CHAIN_DIMS,
    CHAIN_INPUTS,
    CHAIN_OPS,
    CHAIN_OUTPUTS,
    CHAIN_REGISTERS,
    ChainArgs,
    ChainInput,
    ChainOutput,
)
from trine.graph.native.recorder import Recorder, native
from trine.graph.native.tensor import Tensor, collapse

_NAMES = (
    "add sub mul div min max pow prelu neg abs reciprocal sqrt exp log floor ceil round erf sin cos square activate "
    "clip leaky elu hardsigmoid softplus softsign affine const where less less_equal equal to_int to_bool isnan "
    "iadd isub imul imin imax ineg iabs and or xor not iless iless_equal iequal iwhere iconst ibool wrap32 to_float"
)
CODES = {name: number for number, name in enumerate(_NAMES.split(" "))}
"""ChainCode, in its order."""
_INTS = (DType.INT64, DType.INT32, DType.BOOL)
_SHARE = 16 * CHAIN_BLOCK


class UnfitError(Exception):
    """A chain that the kernel can't hold, or an operator that it does not know."""


@dataclass
class Instruction:
    code: str
    to: int
    operands: tuple[int, ...]
    p: float = 0.0
    q: float = 0.0
    n: int = 0


@dataclass
class Chain:
    """A program on virtual registers: operands first, then each instruction's result."""

    inputs: list[Tensor] = field(default_factory=list)
    input_places: list[int] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    places: dict[Value, int] = field(default_factory=dict)
    outputs: list[tuple[int, Value]] = field(default_factory=list)
    count: int = 0
    inlined: list[Value] = field(default_factory=list)
    """Deferred values that this chain computes."""

    def operand(self, tape: Recorder, value: Value) -> int:
        """The virtual register that holds a value."""
        if value not in self.places and value in tape.deferred:
            self.inlined.append(value)
            translate(self, tape, tape.deferred[value])
        elif value not in self.places:
            tensor = tape.tensor(value)
            if tensor is None or tensor.dtype not in (DType.FLOAT32, DType.UINT8, DType.INT8, *_INTS):
                raise UnfitError
            self.inputs.append(tensor)
            self.input_places.append(self.count)
            self.places[value] = self.count
            self.count += 1
        return self.places[value]

    def add(self, code: str, *operands: int, p: float = 0.0, q: float = 0.0, n: int = 0) -> int:
        self.instructions.append(Instruction(code, self.count, operands, p, q, n))
        self.count += 1
        return self.count - 1


Emit = Callable[[Chain, Recorder, Node], int]


def translate(chain: Chain, tape: Recorder, node: Node) -> None:
    """Append the instructions of one node. UnfitError if it can't be one of a chain."""
    emit = EMITTERS.get(node.op)
    if emit is None or sum(bool(value.name) for value in node.outputs) != 1:
        raise UnfitError
    chain.places[node.output] = emit(chain, tape, node)


def _inputs(chain: Chain, tape: Recorder, node: Node) -> list[int]:
    if any(value is None for value in node.inputs):
        raise UnfitError
    return [chain.operand(tape, value) for value in node.inputs if value is not None]


def _floats(node: Node) -> bool:
    """Whether it works on float32 alone. UnfitError for a mixture, or types that registers can't hold exactly."""
    kinds = {value.dtype for value in node.inputs if value is not None}
    if kinds == {DType.FLOAT32}:
        return True
    if len(kinds) == 1 and kinds <= set(_INTS):
        return False
    raise UnfitError


def _wrapped(chain: Chain, node: Node, place: int) -> int:
    """int32 arithmetic wraps."""
    return chain.add("wrap32", place) if node.output.dtype is DType.INT32 else place


def _binary(floats: str, ints: str | None) -> Emit:
    def emit(chain: Chain, tape: Recorder, node: Node) -> int:
        kind = _floats(node)
        if not kind and (ints is None or node.inputs[0] is None or node.inputs[0].dtype is DType.BOOL):
            raise UnfitError
        places = _inputs(chain, tape, node)
        result = places[0]
        for place in places[1:]:
            result = chain.add(floats if kind else str(ints), result, place)
        return result if kind else _wrapped(chain, node, result)

    return emit


def _compare(floats: str, ints: str, *, turned: bool = False, negated: bool = False) -> Emit:
    def emit(chain: Chain, tape: Recorder, node: Node) -> int:
        code = floats if _floats(node) else ints
        a, b = _inputs(chain, tape, node)
        result = chain.add(code, b, a) if turned else chain.add(code, a, b)
        return chain.add("not", result) if negated else result

    return emit


def _unary(floats: str, ints: str | None = None) -> Emit:
    def emit(chain: Chain, tape: Recorder, node: Node) -> int:
        kind = _floats(node)
        if not kind and ints is None:
            raise UnfitError
        return chain.add(floats if kind else str(ints), *_inputs(chain, tape, node))

    return emit


def _logical(code: str) -> Emit:
    def emit(chain: Chain, tape: Recorder, node: Node) -> int:
        if any(value is None or value.dtype is not DType.BOOL for value in node.inputs):
            raise UnfitError
        return chain.add(code, *_inputs(chain, tape, node))

    return emit


def _activation(name: str) -> Emit:
    def emit(chain: Chain, tape: Recorder, node: Node) -> int:
        if not _floats(node):
            raise UnfitError
        return chain.add("activate", *_inputs(chain, tape, node), n=ACTIVATIONS.index(name))

    return emit


def _gelu(chain: Chain, tape: Recorder, node: Node) -> int:
    return _activation("gelu_tanh" if node.attributes.get("approximate") == "tanh" else "gelu")(chain, tape, node)


def _swish(chain: Chain, tape: Recorder, node: Node) -> int:
    alpha = float(node.attributes.get("alpha", 1.0))
    if alpha == 1:
        return _activation("silu")(chain, tape, node)
    if not _floats(node):
        raise UnfitError
    (x,) = _inputs(chain, tape, node)
    return chain.add("mul", x, chain.add("activate", chain.add("affine", x, p=alpha), n=ACTIVATIONS.index("sigmoid")))


def _with(code: str, **defaults: float) -> Emit:
    """Attributes, by p and q."""

    def emit(chain: Chain, tape: Recorder, node: Node) -> int:
        if not _floats(node):
            raise UnfitError
        numbers = [float(node.attributes.get(name, value)) for name, value in defaults.items()]
        p, q = (*numbers, 0.0, 0.0)[:2]
        return chain.add(code, *_inputs(chain, tape, node), p=p, q=q)

    return emit


def _scalar(value: Value | None, default: float) -> float:
    if value is None:
        return default
    if not value.is_constant or value.data.numel() != 1:
        raise UnfitError
    return float(value.data.reshape(()))


def _clip(chain: Chain, tape: Recorder, node: Node) -> int:
    x = node.inputs[0]
    if x is None or x.dtype is not DType.FLOAT32:
        raise UnfitError
    low, high = _scalar(node.input(1), float("-inf")), _scalar(node.input(2), float("inf"))
    return chain.add("clip", chain.operand(tape, x), p=low, q=high)


def _pow(chain: Chain, tape: Recorder, node: Node) -> int:
    x, exponent = node.inputs
    if x is None or exponent is None or x.dtype is not DType.FLOAT32:
        raise UnfitError
    if exponent.is_constant and exponent.data.numel() == 1:
        number = float(exponent.data.reshape(()))
        if number == 2:
            return chain.add("square", chain.operand(tape, x))
    if exponent.dtype is not DType.FLOAT32:
        raise UnfitError
    return chain.add("pow", chain.operand(tape, x), chain.operand(tape, exponent))


def _where(chain: Chain, tape: Recorder, node: Node) -> int:
    condition, a, b = node.inputs
    if condition is None or a is None or b is None or a.dtype is not b.dtype:
        raise UnfitError
    code = {DType.FLOAT32: "where", DType.INT64: "iwhere", DType.INT32: "iwhere", DType.BOOL: "iwhere"}.get(
        a.dtype or DType.STRING
    )
    if code is None:
        raise UnfitError
    return chain.add(code, *(chain.operand(tape, value) for value in (a, b, condition)))


def _cast(chain: Chain, tape: Recorder, node: Node) -> int:
    x = node.inputs[0]
    source, target = None if x is None else x.dtype, from_onnx(node.attributes["to"])
    if x is None or source not in (DType.FLOAT32, *_INTS) or target not in (DType.FLOAT32, *_INTS):
        raise UnfitError
    place = chain.operand(tape, x)
    if source is DType.FLOAT32:
        if target is DType.BOOL:
            return chain.add("to_bool", place)
        raise UnfitError  # what lies outside of the integers' range is torch's own affair
    if target is DType.FLOAT32:
        return chain.add("to_float", place)
    if target is DType.BOOL:
        return chain.add("ibool", place)
    return chain.add("wrap32", place) if target is DType.INT32 else place


EMITTERS: dict[str, Emit] = {
    "Add": _binary("add", "iadd"),
    "Sub": _binary("sub", "isub"),
    "Mul": _binary("mul", "imul"),
    "Div": _binary("div", None),
    "Min": _binary("min", "imin"),
    "Max": _binary("max", "imax"),
    "Sum": _binary("add", None),
    "Pow": _pow,
    "PRelu": _binary("prelu", None),
    "Neg": _unary("neg"),
    "Abs": _unary("abs"),
    "Reciprocal": _unary("reciprocal"),
    "Sqrt": _unary("sqrt"),
    "Exp": _unary("exp"),
    "Log": _unary("log"),
    "Floor": _unary("floor"),
    "Ceil": _unary("ceil"),
    "Round": _unary("round"),
    "Erf": _unary("erf"),
    "Sin": _unary("sin"),
    "Cos": _unary("cos"),
    "Softplus": _unary("softplus"),
    "Softsign": _unary("softsign"),
    "IsNaN": _unary("isnan"),
    "Relu": _activation("relu"),
    "Sigmoid": _activation("sigmoid"),
    "Tanh": _activation("tanh"),
    "Gelu": _gelu,
    "Swish": _swish,
    "HardSwish": _activation("hardswish"),
    "LeakyRelu": _with("leaky", alpha=0.01),
    "Elu": _with("elu", alpha=1.0),
    "HardSigmoid": _with("hardsigmoid", alpha=0.2, beta=0.5),
    "Clip": _clip,
    "Where": _where,
    "Cast": _cast,
    "Less": _compare("less", "iless"),
    "Greater": _compare("less", "iless", turned=True),
    "LessOrEqual": _compare("less_equal", "iless_equal"),
    "GreaterOrEqual": _compare("less_equal", "iless_equal", turned=True),
    "Equal": _compare("equal", "iequal"),
    "And": _logical("and"),
    "Or": _logical("or"),
    "Xor": _logical("xor"),
    "Not": _logical("not"),
}


def emit_chain(tape: Recorder, chain: Chain, results: list[Value]) -> None:
    """A step that runs the chain and keeps `results`, which all have one shape. UnfitError if that is too much."""
    shape = results[0].static_shape
    if shape is None or any(value.static_shape != shape or value.dtype is None for value in results):
        raise UnfitError
    if len(chain.inputs) > CHAIN_INPUTS or len(chain.instructions) > CHAIN_OPS or len(results) > CHAIN_OUTPUTS:
        raise UnfitError
    operands = [tensor.expand(shape) for tensor in chain.inputs]
    last = len(shape) >= 3 and _prefers_channels_last(chain.inputs, shape)
    outputs = [tape.output(value, channels_last=last) for value in results]
    order = sorted(range(len(shape)), key=lambda axis: -outputs[0].strides[axis])
    sizes, merged = collapse(
        [shape[axis] for axis in order], [[t.strides[axis] for axis in order] for t in (*operands, outputs[0])]
    )
    if len(sizes) > CHAIN_DIMS:
        raise UnfitError
    args = ChainArgs(count=prod(shape), dims=len(sizes), task=_SHARE)
    args.shape[: len(sizes)] = sizes
    pointers: dict[str | int, Tensor | None] = {}
    registers = _allocate(chain, results, {k for k, own in enumerate(merged[:-1]) if not any(own)})
    for k, (tensor, strides) in enumerate(zip(operands, merged, strict=False)):
        args.inputs[k].strides[: len(sizes)] = strides
        args.inputs[k].dtype, args.inputs[k].to = tensor.number, registers[chain.input_places[k]]
        pointers[ChainArgs.inputs.offset + k * ctypes.sizeof(ChainInput)] = tensor
    for k, (value, tensor) in enumerate(zip(results, outputs, strict=True)):
        args.outputs[k].dtype, args.outputs[k].source = tensor.number, registers[chain.places[value]]
        pointers[ChainArgs.outputs.offset + k * ctypes.sizeof(ChainOutput)] = tensor
    for k, instruction in enumerate(chain.instructions):
        op = args.ops[k]
        op.code, op.to = CODES[instruction.code], registers[instruction.to]
        op.a, op.b, op.c = (*(registers[operand] for operand in instruction.operands), 0, 0, 0)[:3]
        op.p, op.q, op.n = instruction.p, instruction.q, instruction.n
    args.input_count, args.output_count, args.op_count = len(operands), len(outputs), len(chain.instructions)
    in_place = [(tensor, outputs[0]) for tensor in operands] if len(results) == 1 else []
    tape.step("chain", args, pointers, in_place=in_place)


def _prefers_channels_last(inputs: list[Tensor], shape: tuple[int, ...]) -> bool:
    """Whether the largest operand has its channels innermost."""
    return any(t.shape == shape and t.is_image and not t.is_contiguous for t in inputs)


def _allocate(chain: Chain, results: list[Value], single: Collection[int]) -> list[int]:
    """The kernel's register for each virtual one. Operands of one element (`single`) and results keep theirs."""
    last: dict[int, int] = {}
    for time, instruction in enumerate(chain.instructions):
        for operand in instruction.operands:
            last[operand] = time
    for place in (*(chain.places[value] for value in results), *(chain.input_places[k] for k in single)):
        last[place] = len(chain.instructions)
    free = list(range(CHAIN_REGISTERS))[::-1]
    registers = [0] * chain.count

    def take(place: int) -> None:
        if not free:
            raise UnfitError
        registers[place] = free.pop()

    for place in chain.input_places:
        take(place)
    for time, instruction in enumerate(chain.instructions):
        take(instruction.to)
        for operand in set(instruction.operands):
            if last[operand] == time:
                free.append(registers[operand])
    return registers


def may_defer(graph: Graph) -> set[Node]:
    """Elementwise nodes with one reader, elementwise too and of the same shape: it can compute them itself."""
    found = set()
    results = set(graph.outputs)
    for value, readers in graph.users().items():
        node, reader = value.producer, readers[0]
        if (
            node is not None
            and node.op in EMITTERS
            and reader.op in EMITTERS
            and len(readers) == 1
            and value not in results
            and value.static_shape is not None
            and value.static_shape == reader.output.static_shape
        ):
            found.add(node)
    return found


def compute(tape: Recorder, node: Node) -> bool:
    """Steps for the node and for the deferred nodes that it reads: one, or where that is too much, several."""
    chain = Chain()
    try:
        translate(chain, tape, node)
        emit_chain(tape, chain, [node.output])
    except UnfitError:
        waiting = [value for value in chain.inlined if value in tape.deferred]
        if not waiting:
            return False
        for value in waiting:
            tape.materialise(value)
        return compute(tape, node)
    for value in chain.inlined:
        tape.deferred.pop(value, None)
    return True


def _rule(tape: Recorder, node: Node) -> bool:
    if node not in tape.may_defer:
        return compute(tape, node)
    trial = Chain()
    try:  # whether the kernel knows the operator shows in a trial
        translate(trial, tape, node)
    except UnfitError:
        return False
    if not _fits(trial, node.output):
        for value in node.inputs:
            if value is not None:
                tape.materialise(value)  # the chain is cut here
    tape.deferred[node.output] = node
    return True


def _fits(chain: Chain, result: Value) -> bool:
    """Whether the kernel holds the chain, and one more operation after it."""
    if len(chain.inputs) >= CHAIN_INPUTS or len(chain.instructions) > CHAIN_OPS - 4:
        return False
    try:
        _allocate(chain, [result], range(len(chain.inputs)))
    except UnfitError:
        return False
    return True


for _op in EMITTERS:
    native(_op)(_rule)
