"""Which values of float32 lie in bfloat16 between kernels, in a plan of that precision.

A product rounds its input to bfloat16 anyway: where nobody else reads a value, nothing is lost by keeping it so. Sums
along a network (residuals), what is pooled or normed and what attention reads lose the bits that they would lose in
other runtimes' bfloat16. Half the bytes go to memory and back, and tiles read them as they lie.
"""

from __future__ import annotations

from collections.abc import Collection

from trine.graph.dtypes import DType
from trine.graph.ir import Graph, Node, Value
from trine.graph.native.tape import library

_TILES = (b"amx", b"emulated")
_PRODUCTS = ("ReducedConv", "ReducedLinear")
_NORMS = ("LayerNormalization", "RMSNormalization")
_MOVERS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Transpose", "Slice", "Split")
_POOLS = ("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool")


def has_tiles() -> bool:
    """Whether the kernels have the tile registers of AMX."""
    return library().trine_isa() in _TILES


def narrow_values(graph: Graph) -> frozenset[Value]:
    """None without tiles, or where nothing takes products in bfloat16."""
    if not has_tiles() or not any(_is_product(node) for node in graph.nodes):
        return frozenset()
    fit = {value for node in graph.nodes for value in node.outputs if _is_float(value)} - set(graph.outputs)
    ties: list[set[Value]] = []
    for node in graph.nodes:
        operands = {value for value in node.reads() if _is_float(value) and value.producer is not None}
        results = {value for value in node.outputs if value.name}
        free, tied = _roles(node)
        fit -= (operands | results) - free - tied
        if tied:
            ties.append(tied)
    changed = True
    while changed:
        changed = False
        for tied in ties:
            if not tied <= fit and tied & fit:
                fit -= tied
                changed = True
    return frozenset(fit)


def _is_float(value: Value) -> bool:
    return (
        bool(value.name) and value.dtype is DType.FLOAT32 and value.static_shape is not None and not value.is_constant
    )


def _is_product(node: Node) -> bool:
    weight = node.input(1) if node.op in _PRODUCTS else None
    return weight is not None and weight.is_constant and weight.dtype is DType.BFLOAT16


def spreads(node: Node) -> bool:
    """Whether a transposed convolution writes each result once: kernels as large as the strides, no padding."""
    weight, a = node.input(1), node.attributes
    if node.op != "ConvTranspose" or weight is None or not weight.is_constant or weight.rank != 4:
        return False
    plain = not any(a.get("pads") or []) and not any(a.get("output_padding") or []) and not a.get("output_shape")
    alone = a.get("group", 1) == 1 and a.get("auto_pad", "NOTSET") == "NOTSET"
    single = all(d == 1 for d in a.get("dilations") or [])
    kernel = list(weight.data.shape[2:])
    whole = weight.data.shape[0] % 32 == 0 and list(a.get("strides") or [1, 1]) == kernel
    return plain and alone and single and whole


def _computed(node: Node, places: Collection[int]) -> set[Value]:
    found = {value for place in places if (value := node.input(place)) is not None}
    return {value for value in found if not value.is_constant}


def _roles(node: Node) -> tuple[set[Value], set[Value]]:
    """Values that the node's kernel takes in either type, and those that it takes in one type only."""
    results = {value for value in node.outputs if value.name}
    if _is_product(node):
        values = _computed(node, (0, 3)) | results
        weight = node.inputs[1]
        depthwise = node.op == "ReducedConv" and node.attributes["group"] > 1 and weight.data.shape[1] == 1  # type: ignore[union-attr]
        return (set(), values) if depthwise else (values, set())
    if node.op in _NORMS:
        return _computed(node, (0,)) | results, set()
    if spreads(node):
        return _computed(node, (0,)) | results, set()
    if node.op == "ScaledDotProductAttention":
        return results, _computed(node, (0, 1, 2))
    if node.op == "Concat":
        return set(), _computed(node, range(len(node.inputs))) | results
    if node.op in _MOVERS or node.op in _POOLS:
        return set(), _computed(node, (0,)) | results
    return set(), set()
