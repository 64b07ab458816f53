"""An ONNX model as a graph: operator sets 1 to 25, functions inlined, subgraphs kept, old forms brought to new ones."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trine.graph.dtypes import DType, from_onnx
from trine.graph.errors import ModelFormatError, UnsupportedOperatorError, VerificationError
from trine.graph.importer.gradient import gradient_node
from trine.graph.importer.node import RawNode
from trine.graph.importer.versions import modernise
from trine.graph.importer.weights import decode_tensor
from trine.graph.ir import Dim, Graph, Node, Value, constant
from trine.graph.operators import check
from trine.graph.operators.room import bytes_of, largest
from trine.graph.shapes import Inference

NEWEST_OPSET = 25
_STANDARD = ("", "ai.onnx")
_MOST_INLINED = 100_000
"""Nodes and calls that functions may stand for: a few that call each other twice each are billions."""
_GRADIENT = ("ai.onnx.preview.training", "Gradient")


def import_model(source: str | os.PathLike[str] | bytes | Any, folder: Path | None = None) -> Graph:
    """The graph of an ONNX file, its bytes, or a ModelProto; `folder` has the external data of the latter two.

    Raises ModelFormatError for what is no valid model, UnsupportedOperatorError for what Trine has no meaning for.
    """
    model, folder = _read(source, folder)
    if not model.graph.node and not model.graph.output:
        raise ModelFormatError("the ONNX model has an empty graph: the file is damaged, or it is another kind of file")
    importer = _Importer(model, folder)
    try:
        graph = importer.run()
        graph.verify()
    except VerificationError as error:
        raise ModelFormatError(str(error)) from error
    except RecursionError:
        raise ModelFormatError(
            "the model nests subgraphs or functions too deeply, or a function calls itself"
        ) from None
    return graph


def _read(source: Any, folder: Path | None) -> tuple[Any, Path | None]:
    import onnx
    from google.protobuf.message import DecodeError

    if isinstance(source, onnx.ModelProto):
        return source, folder
    if isinstance(source, bytes):
        name, data = "the model", source
    else:
        path = Path(source)
        if not path.is_file():
            raise ModelFormatError(f"{str(source)!r} is not a file: give the path of an .onnx file")
        name, data, folder = repr(str(source)), path.read_bytes(), path.parent
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except (DecodeError, RuntimeError, ValueError):
        raise ModelFormatError(f"{name} is not an ONNX model, or it is damaged or cut off: export it again") from None
    return model, folder


@dataclass
class _Scope:
    """The names of one graph, and of those around it."""

    parent: _Scope | None
    nodes: list[Node]
    opsets: Mapping[str, int]
    values: dict[str, Value | None] = field(default_factory=dict)
    attributes: Mapping[str, Any] | None = None
    """Inside a function, the attributes of its call."""
    prefix: str = ""

    def find(self, name: str, node: str) -> Value | None:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope.parent
        raise ModelFormatError(
            f"node {node!r} reads {name!r}, which no node before it makes: the graph is cyclic, out of order or damaged"
        )


class _Importer:
    def __init__(self, model: Any, folder: Path | None) -> None:
        self.model = model
        self.folder = folder
        self.functions = {(f.domain, f.name): f for f in model.functions}
        self.opsets = _opsets(model.opset_import)
        self.inference = Inference()
        self.taken: dict[str, int] = {}
        self.symbols = 0
        self.inlined = 0
        self.tensor_types: dict[int, DType] = {}  # of attributes' tensors, since torch has no int4

    def run(self) -> Graph:
        return self.graph(self.model.graph, None, self.opsets, None)

    def graph(
        self, proto: Any, parent: _Scope | None, opsets: Mapping[str, int], attributes: Mapping[str, Any] | None
    ) -> Graph:
        graph = Graph(proto.name)
        scope = _Scope(
            parent, graph.nodes, opsets, attributes=attributes, prefix="" if parent is None else parent.prefix
        )
        for tensor in proto.initializer:
            self.define_constant(scope, tensor.name, *decode_tensor(tensor, self.folder))
        for tensor in proto.sparse_initializer:
            self.define_constant(scope, tensor.values.name, *self.dense(tensor))
        for info in proto.input:
            if info.name not in scope.values:
                value = self.declared(info)
                self.define(scope, info.name, value)
                graph.inputs.append(value)
        for node in proto.node:
            self.node(node, scope)
        for info in proto.output:
            graph.outputs.append(self.output(graph, scope, info))
            graph.output_names.append(info.name)
        return graph

    def output(self, graph: Graph, scope: _Scope, info: Any) -> Value:
        value = scope.find(info.name, f"outputs of {graph.name}")
        if value is None:
            raise ModelFormatError(f"output {info.name!r} of graph {graph.name!r} is an input that was left out")
        declared = self.declared(info)
        if value.dtype is None:
            value.dtype = declared.dtype
        elif declared.dtype is not None and declared.dtype is not value.dtype:
            raise ModelFormatError(
                f"output {info.name!r} is declared {declared.dtype}, but the graph computes {value.dtype}"
            )
        if value.shape is None and declared.shape is not None:
            value.shape = declared.shape
        return value

    def declared(self, info: Any) -> Value:
        """A value as a graph's interface declares it."""
        if not info.type.HasField("tensor_type"):
            return Value(info.name)
        tensor = info.type.tensor_type
        dtype = from_onnx(tensor.elem_type)
        if dtype is None and tensor.elem_type:
            raise ModelFormatError(f"{info.name!r} has element type {tensor.elem_type}, which is not supported")
        if not tensor.HasField("shape"):
            return Value(info.name, dtype)
        return Value(info.name, dtype, tuple(self.dim(dim, info.name) for dim in tensor.shape.dim))

    def dim(self, proto: Any, name: str) -> Dim:
        if proto.HasField("dim_value"):
            if proto.dim_value < 0:
                raise ModelFormatError(f"{name!r} has a negative dimension: {proto.dim_value}")
            return int(proto.dim_value)
        self.symbols += 1
        return _symbol(proto.dim_param) or f"?{name}.{self.symbols}"

    def unique(self, name: str) -> str:
        """The name itself the first time, then name.1, name.2 …"""
        if name not in self.taken:
            self.taken[name] = 0
            return name
        self.taken[name] += 1
        return self.unique(f"{name}.{self.taken[name]}")

    def define(self, scope: _Scope, name: str, value: Value) -> None:
        if not isinstance(name, str):
            raise ModelFormatError(f"the name {name!r} is no text: the file is damaged; export the model again")
        if name in scope.values:
            raise ModelFormatError(f"the name {name!r} is defined twice: the model is not in single-assignment form")
        value.name = self.unique(scope.prefix + name)
        scope.values[name] = value

    def define_constant(self, scope: _Scope, name: str, data: Any, dtype: DType) -> None:
        value = Value(name, dtype, tuple(data.shape), data)
        self.inference.learn_constant(value)
        self.define(scope, name, value)

    def dense(self, proto: Any) -> tuple[Any, DType]:
        values, dtype = decode_tensor(proto.values, self.folder)
        places, _ = decode_tensor(proto.indices, self.folder)
        shape = list(proto.dims)
        if any(size < 0 for size in shape) or bytes_of(shape, dtype.numpy.itemsize) > largest():
            raise ModelFormatError(f"sparse tensor {proto.values.name!r} of shape {shape} does not fit this machine")
        dense = torch.zeros(shape, dtype=dtype.torch)
        index = (places,) if places.dim() == 1 and len(shape) > 1 else tuple(places.reshape(len(values), -1).T)
        try:
            if len(index) == 1 and len(shape) > 1:
                dense.reshape(-1)[index[0]] = values
            else:
                dense[index] = values
        except (IndexError, RuntimeError, ValueError):
            raise ModelFormatError(f"sparse tensor {proto.values.name!r} has indices outside {shape}") from None
        return dense, dtype

    def node(self, proto: Any, scope: _Scope) -> None:
        if not all(isinstance(text, str) for text in (proto.name, proto.op_type, proto.domain)):
            raise ModelFormatError(f"node {proto.name!r} has names that are no text: the file is damaged")
        name = scope.prefix + (proto.name or f"{proto.op_type}_{len(scope.nodes)}")
        function = self.functions.get((proto.domain, proto.op_type))
        attributes = self.attributes(proto, scope, name)
        inputs = [scope.find(key, name) if key else None for key in proto.input]
        if function is not None:
            self.call(function, proto, scope, name, inputs, attributes)
            return
        if (proto.domain, proto.op_type) == _GRADIENT:
            self.gradient(proto, scope, name, inputs, attributes)
            return
        if proto.domain not in _STANDARD:
            raise UnsupportedOperatorError(
                f"{proto.domain}.{proto.op_type}", name, "is of a domain that is not supported"
            )
        if proto.op_type == "Constant":
            self.constant_node(proto, scope, name, attributes)
            return
        version = scope.opsets.get("")
        if version is None:
            raise ModelFormatError(f"node {name!r} uses ONNX operators, but the model imports no operator set of them")

        def emit(op: str, arguments: list[Value | None], options: dict[str, Any]) -> Value:
            result = Value(self.unique(f"{name}.{op}"))
            self.add(scope, Node(op, arguments, [result], options, name))
            return result

        count = max((i + 1 for i, key in enumerate(proto.output) if key), default=0)
        raw = RawNode(proto.op_type, name, version, inputs, attributes, count, emit)
        try:
            modernise(raw)
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UnsupportedOperatorError(
                raw.op, name, f"has inputs and attributes that don't go together ({reason})"
            ) from error
        check(raw.op, name, raw.inputs, raw.attributes)
        outputs = [Value("") for _ in range(count)]
        for key, value in zip(proto.output, outputs, strict=False):
            if key:
                self.define(scope, key, value)
        self.add(scope, Node(raw.op, raw.inputs, outputs, raw.attributes, name))

    def add(self, scope: _Scope, node: Node) -> None:
        for value in node.inputs:
            if value is not None and value.is_constant:
                self.inference.learn_constant(value)
                if value.name not in self.taken:
                    self.taken[value.name] = 0
        scope.nodes.append(node)
        self.inference.visit(node)

    def gradient(
        self, proto: Any, scope: _Scope, name: str, inputs: list[Value | None], attributes: dict[str, Any]
    ) -> None:
        xs = [scope.find(x, name) for x in attributes.get("xs", [])]
        y = scope.find(attributes.get("y", ""), name)
        known = [x for x in xs if x is not None]
        if attributes.get("zs") or y is None or not known or len(known) != len(inputs):
            raise UnsupportedOperatorError(
                "Gradient", name, "needs y and xs, as many as it has inputs; zs is not supported"
            )
        node = gradient_node(name, known, inputs, y, len(proto.output), scope.nodes)
        for key, value, x in zip(proto.output, node.outputs, known, strict=False):
            value.dtype, value.shape = x.dtype, x.shape
            if key:
                self.define(scope, key, value)
        scope.nodes.append(node)

    def constant_node(self, proto: Any, scope: _Scope, name: str, attributes: dict[str, Any]) -> None:
        if len(attributes) != 1 or len(proto.output) != 1:
            raise UnsupportedOperatorError("Constant", name, "must have one attribute and one output")
        ((kind, data),) = attributes.items()
        if kind in ("value", "sparse_value"):
            value = constant(name, data)
            value.dtype = self.tensor_types.get(id(data), value.dtype)
        elif kind in ("value_float", "value_floats"):
            value = constant(name, torch.tensor(data, dtype=torch.float32))
        elif kind in ("value_int", "value_ints"):
            value = constant(name, torch.tensor(data, dtype=torch.int64))
        elif kind in ("value_string", "value_strings"):
            value = constant(name, np.array(data, dtype=object))
        else:
            raise UnsupportedOperatorError("Constant", name, f"has no attribute {kind!r} that Trine knows")
        self.inference.learn_constant(value)
        self.define(scope, proto.output[0], value)

    def call(
        self,
        function: Any,
        proto: Any,
        scope: _Scope,
        name: str,
        inputs: list[Value | None],
        attributes: dict[str, Any],
    ) -> None:
        """The function's nodes in place of the call."""
        if len(inputs) > len(function.input) or len(proto.output) > len(function.output):
            raise ModelFormatError(f"node {name!r} calls function {function.name!r} with too many inputs or outputs")
        defaults = {a.name: self.attribute(a, scope, name) for a in function.attribute_proto}
        inner = _Scope(
            None, scope.nodes, _opsets(function.opset_import), attributes=defaults | attributes, prefix=f"{name}/"
        )
        inner.values.update(zip(function.input, inputs, strict=False))
        inner.values.update((missing, None) for missing in function.input[len(inputs) :])
        if len(inner.prefix) > 2000:
            raise RecursionError
        self.inlined += 1 + len(function.node)
        if self.inlined > _MOST_INLINED:
            raise ModelFormatError(
                f"functions that call functions make the model larger than {_MOST_INLINED} nodes: inline them first"
            )
        for node in function.node:
            self.node(node, inner)
        for outer, key in zip(proto.output, function.output, strict=False):
            if not outer:
                continue
            if outer in scope.values:
                raise ModelFormatError(
                    f"the name {outer!r} is defined twice: the model is not in single-assignment form"
                )
            scope.values[outer] = inner.find(key, name)

    def attributes(self, proto: Any, scope: _Scope, node: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for attribute in proto.attribute:
            if attribute.name in found:
                raise ModelFormatError(f"node {node!r} has the attribute {attribute.name!r} twice")
            if attribute.ref_attr_name:
                given = (scope.attributes or {}).get(attribute.ref_attr_name)
                if given is not None:
                    found[attribute.name] = given
            else:
                found[attribute.name] = self.attribute(attribute, scope, node)
        return found

    def attribute(self, proto: Any, scope: _Scope, node: str) -> Any:
        kind = proto.type or _kind_of(proto)
        if kind == 4:
            data, dtype = decode_tensor(proto.t, self.folder)
            self.tensor_types[id(data)] = dtype
            return data
        if kind == 5:
            return self.graph(proto.g, scope, scope.opsets, scope.attributes)
        if kind == 11:
            return self.dense(proto.sparse_tensor)[0]
        if kind == 13:
            return "type"
        plain = {1: "f", 2: "i", 6: "floats", 7: "ints"}
        if kind in plain:
            data = getattr(proto, plain[kind])
            return data if kind < 6 else list(data)
        if kind == 3:
            return proto.s.decode("utf-8", "replace")
        if kind == 8:
            return [text.decode("utf-8", "replace") for text in proto.strings]
        raise ModelFormatError(f"node {node!r}: attribute {proto.name!r} has a type ({kind}) that Trine does not read")


def _kind_of(proto: Any) -> int:
    """The type of an attribute of the first version of the format, which did not say."""
    for kind, name in ((1, "f"), (2, "i"), (3, "s"), (4, "t"), (5, "g")):
        if proto.HasField(name):
            return kind
    for kind, name in ((6, "floats"), (7, "ints"), (8, "strings")):
        if getattr(proto, name):
            return kind
    return 0


def _symbol(text: str) -> str:
    """A dimension's name, without the characters that dims.py gives a meaning to."""
    return "".join(letter if letter.isalnum() or letter in "_.?" else "_" for letter in text)


def _opsets(imports: Any) -> dict[str, int]:
    """Operator sets by domain. ModelFormatError for one that is newer than this importer."""
    found = {("" if item.domain in _STANDARD else item.domain): int(item.version) for item in imports}
    version = found.get("", 1)
    if not 1 <= version <= NEWEST_OPSET:
        raise ModelFormatError(
            f"the model uses ONNX operator set {version}; Trine knows 1 to {NEWEST_OPSET}: export it with an older one"
        )
    return found
