"""The plan file: a header in JSON, then the weights, each aligned, mapped into memory when a plan is loaded.

    8 bytes   TRINEPLN
    8 bytes   length of the header, little endian
    16 bytes  BLAKE2b digest of the header
    header    {"version", "graph", "values", "weights": [{"dtype", "shape", "offset", "bytes"}, …],
               "tactics", "effects", "profiles", "packed": {"library", "entries": {name: weight}}}
    weights   from the next multiple of 64 on; offsets count from there

Values are numbers in the order in which they are met; a node is a list of its operator, name, inputs, outputs,
attributes and origins. The file holds no code. Weights stand in it as the model has them, and, under "packed", as the
kernels of one build of the native library want them: another build packs for itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trine.graph.dtypes import FROM_TORCH, DType
from trine.graph.errors import PlanError
from trine.graph.ir import Graph, Node, Value
from trine.kernels.cpu.native import PATH

MAGIC = b"TRINEPLN"
VERSION = 4
_ALIGNMENT = 64
_HEAD = 32
_TENSORRT = (b"ftrt", b"ptrt")
"""How TensorRT's engines begin."""


def save(
    path: str | os.PathLike[str],
    graph: Graph,
    extra: Mapping[str, Any],
    packed: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the graph, its weights, and `extra` (JSON) under the header's key of that name; whole or not at all.

    `packed` are weights in the layouts of this machine's kernels.
    """
    writer = _Writer()
    header: dict[str, Any] = {"version": VERSION, "graph": writer.graph(graph), **extra}
    entries = {key: writer.data(tensor, FROM_TORCH[tensor.dtype]) for key, tensor in (packed or {}).items()}
    header["packed"] = {"library": library_digest(), "entries": entries}
    header["values"] = writer.values
    header["weights"] = writer.layout
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    start = _aligned(_HEAD + len(text))
    target = Path(path)
    with tempfile.NamedTemporaryFile(dir=target.parent or Path(), delete=False) as file:
        try:
            os.fchmod(file.fileno(), 0o644)  # a server may run as another user
            file.write(MAGIC + len(text).to_bytes(8, "little") + _digest(text) + text)
            for tensor, described in zip(writer.tensors, writer.layout, strict=True):
                file.seek(start + described["offset"])
                file.write(tensor.data)
            file.truncate(start + writer.size)
        except BaseException:
            os.unlink(file.name)
            raise
    os.replace(file.name, target)


def load(path: str | os.PathLike[str]) -> tuple[Graph, dict[str, Any], dict[str, torch.Tensor]]:
    """The graph, its constants over the mapped file; the header; and the packed weights, if they are this library's.

    PlanError for what is no plan of this version.
    """
    name = repr(str(path))
    try:
        with open(path, "rb") as file:
            magic, length, digest = file.read(8), int.from_bytes(file.read(8), "little"), file.read(16)
            size = os.fstat(file.fileno()).st_size
            if magic[:4] in _TENSORRT:
                raise PlanError(
                    f"{name} is an engine of TensorRT, which no other software can run: build a plan of the ONNX model "
                    "that it was made from, with `trine build model.onnx -o model.plan`"
                )
            if magic != MAGIC:
                raise PlanError(f"{name} is not a Trine plan: make one with `trine build model.onnx -o model.plan`")
            if length > size:
                raise PlanError(f"{name} is cut off: build the plan again")
            text = file.read(length)
            header = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise PlanError(f"{name} is damaged: build the plan again") from None
    except OSError as error:
        raise PlanError(f"{name} can't be read: {error.strerror}") from None
    if not isinstance(header, dict) or header.get("version") != VERSION:
        raise PlanError(
            f"{name} is of plan version {header.get('version')}, not {VERSION}: build it again with this Trine"
        )
    if digest != _digest(text):
        raise PlanError(f"{name} is damaged: build the plan again")
    try:
        reader = _Reader(header, _map(path, _aligned(_HEAD + length), size))
        graph = reader.graph(header["graph"])
        own = header["packed"]["library"] == library_digest()
        packed = {key: reader.tensor(index) for key, index in header["packed"]["entries"].items()} if own else {}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError):
        raise PlanError(f"{name} is damaged: build the plan again") from None
    graph.verify()
    return graph, header, packed


@cache
def library_digest() -> str:
    """Which build of the native library this is; packed weights are for one."""
    return hashlib.blake2b(PATH.read_bytes(), digest_size=16).hexdigest() if PATH.exists() else ""


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).digest()


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _map(path: str | os.PathLike[str], start: int, size: int) -> np.ndarray[Any, Any]:
    if start >= size:
        return np.zeros(0, dtype=np.uint8)
    return np.memmap(path, dtype=np.uint8, mode="c", offset=0, shape=(size,))[start:]


class _Writer:
    def __init__(self) -> None:
        self.numbers: dict[Value, int] = {}
        self.values: list[list[Any]] = []
        self.layout: list[dict[str, Any]] = []
        self.tensors: list[np.ndarray[Any, Any]] = []
        self.size = 0

    def value(self, value: Value | None) -> int:
        if value is None:
            return -1
        if value not in self.numbers:
            self.numbers[value] = len(self.values)
            described: list[Any] = [value.name, value.dtype, value.shape, None]
            self.values.append(described)
            if value.is_constant:
                described[3] = self.data(value.data, value.dtype)
        return self.numbers[value]

    def data(self, data: Any, dtype: DType | None) -> Any:
        """A weight's number, or strings as they are."""
        if isinstance(data, np.ndarray):
            return {"strings": data.ravel().tolist()}
        stored = data.detach().contiguous()
        raw = stored.reshape(-1).view(torch.uint8).numpy() if stored.numel() else np.zeros(0, np.uint8)
        offset = _aligned(self.size)
        self.layout.append(
            {"dtype": dtype or str(stored.dtype), "shape": list(stored.shape), "offset": offset, "bytes": raw.nbytes}
        )
        self.tensors.append(raw)
        self.size = offset + raw.nbytes
        return len(self.layout) - 1

    def graph(self, graph: Graph) -> dict[str, Any]:
        return {
            "name": graph.name,
            "inputs": [self.value(value) for value in graph.inputs],
            "nodes": [self.node(node) for node in graph.nodes],
            "outputs": [self.value(value) for value in graph.outputs],
            "output_names": graph.output_names,
        }

    def node(self, node: Node) -> list[Any]:
        inputs = [self.value(value) for value in node.inputs]
        attributes = {key: self.attribute(value) for key, value in node.attributes.items()}
        outputs = [self.value(value) for value in node.outputs]
        return [node.op, node.name, inputs, outputs, attributes, node.origins]

    def attribute(self, value: Any) -> Any:
        if isinstance(value, Graph):
            return {"graph": self.graph(value)}
        if isinstance(value, torch.Tensor):
            from trine.graph.dtypes import FROM_TORCH

            return {"tensor": self.data(value, FROM_TORCH[value.dtype])}
        return value


class _Reader:
    def __init__(self, header: dict[str, Any], weights: np.ndarray[Any, Any]) -> None:
        self.header, self.weights = header, weights
        self.values: list[Value] = [self.value(*described) for described in header["values"]]

    def value(self, name: str, dtype: str | None, shape: list[int | str] | None, data: Any) -> Value:
        kind = None if dtype is None else DType(dtype)
        dims = None if shape is None else tuple(shape)
        if data is None:
            return Value(name, kind, dims)
        if isinstance(data, dict):
            strings = np.array(data["strings"], dtype=object).reshape([d for d in dims or () if isinstance(d, int)])
            return Value(name, kind, dims, strings)
        return Value(name, kind, dims, self.tensor(data))

    def tensor(self, index: int) -> torch.Tensor:
        described = self.header["weights"][index]
        kind, shape = DType(described["dtype"]).torch, described["shape"]
        start, count = described["offset"], described["bytes"]
        if (
            min(start, count, *shape, 0) < 0
            or start + count > len(self.weights)
            or prod(shape) * kind.itemsize != count
        ):
            raise ValueError("a weight lies outside the file")
        if not count:
            return torch.zeros(shape, dtype=kind)
        return torch.from_numpy(self.weights[start : start + count]).view(kind).reshape(shape)

    def graph(self, described: dict[str, Any]) -> Graph:
        values = self.values
        graph = Graph(described["name"], output_names=list(described["output_names"]))
        graph.inputs = [values[index] for index in described["inputs"]]
        for op, name, inputs, outputs, attributes, origins in described["nodes"]:
            graph.nodes.append(
                Node(
                    op,
                    [None if index < 0 else values[index] for index in inputs],
                    [values[index] for index in outputs],
                    {key: self.attribute(value) for key, value in attributes.items()},
                    name,
                    tuple(str(origin) for origin in origins),
                )
            )
        graph.outputs = [values[index] for index in described["outputs"]]
        return graph

    def attribute(self, value: Any) -> Any:
        if isinstance(value, dict):
            return self.graph(value["graph"]) if "graph" in value else self.tensor(value["tensor"])
        return value
