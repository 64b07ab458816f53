"""Small ONNX models for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str] | None],
    outputs: Sequence[str],
    weights: Mapping[str, Any] | None = None,
    opset: int = 17,
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model of float32 inputs with these shapes; weights are initialisers."""
    of_any_shape = onnx.TypeProto(tensor_type=onnx.TypeProto.Tensor(elem_type=dtype))
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [onnx.ValueInfoProto(name=name, type=of_any_shape) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    made.ir_version = 9
    return made


def weights(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.2


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    """`inputs` and `output` are names with spaces between them; a dot stands for one that is left out."""
    names = ["" if name == "." else name for name in inputs.split()]
    return helper.make_node(op, names, output.split(), **attributes)
