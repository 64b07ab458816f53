"""Nodes whose inputs are all constants, computed once at build by the operator's own meaning."""

from __future__ import annotations

from math import prod

import numpy as np
import torch

from trine.graph.dtypes import FROM_TORCH, DType
from trine.graph.ir import Graph, Node, constant
from trine.graph.operators import find
from trine.graph.runtime import bind
from trine.graph.shapes import Inference

_LARGEST = 1 << 24
"""Elements: a constant that a model grows to more than this (Expand, ConstantOfShape) stays computed."""


def fold_constants(graph: Graph) -> Graph:
    """Replace by a constant what depends on no input; Shape of a static shape, too."""
    inference = Inference()
    for value in graph.constants():
        inference.learn_constant(value)
    for node in list(graph.nodes):
        for subgraph in node.subgraphs:
            fold_constants(subgraph)
        inference.visit(node)
        if _foldable(node):
            _fold(graph, node, inference)
        elif node.outputs[0].dtype is DType.INT64 and node.output in inference.contents:
            _fold_known(graph, node, inference)
    return graph


def _foldable(node: Node) -> bool:
    if node.subgraphs or not find(node.op, node.name).pure or node.op.startswith(("Sequence", "Optional", "SplitTo")):
        return False
    if not all(value is None or value.is_constant for value in node.inputs):
        return False
    if node.op == "DequantizeLinear":
        return False  # integers are what a plan wants to keep
    shapes = [value.static_shape for value in node.outputs]
    return all(shape is None or prod(shape) <= _LARGEST for shape in shapes) and bool(node.inputs)


def _fold(graph: Graph, node: Node, inference: Inference) -> None:
    if node.op in ("ConstantOfShape", "Expand", "Tile", "Range") and node.output.static_shape is None:
        return
    kernel, _ = bind(node)
    try:
        with torch.inference_mode(False), torch.no_grad():
            results = kernel(*[None if value is None else value.data for value in node.inputs])
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError):
        return  # it fails when the plan runs, with the node's name
    results = results if isinstance(results, tuple) else (results,)
    if any(not isinstance(result, torch.Tensor | np.ndarray) for result in results):
        return
    graph.nodes.remove(node)
    for value, result in zip(node.outputs, results, strict=False):
        if value.name:
            data = result.contiguous().clone() if isinstance(result, torch.Tensor) else result
            stored = FROM_TORCH[data.dtype] if isinstance(data, torch.Tensor) else DType.STRING
            dtype = value.dtype if value.dtype is not None and value.dtype in (DType.INT4, DType.UINT4) else stored
            folded = constant(value.name, data, dtype)
            graph.replace(value, folded)
            inference.learn_constant(folded)


def _fold_known(graph: Graph, node: Node, inference: Inference) -> None:
    """A vector of dimensions that are all numbers, though the tensor they belong to is not constant."""
    numbers = inference.contents[node.output]
    shape = node.output.static_shape
    if shape is None or len(shape) > 1 or not all(isinstance(number, int) for number in numbers):
        return
    if prod(shape) != len(numbers):
        return
    data = torch.tensor(numbers, dtype=torch.int64).reshape(shape)
    value = constant(node.output.name, data)
    graph.nodes.remove(node)
    graph.replace(node.output, value)
    inference.learn_constant(value)
