"""The repository that both servers get, file by file the same: models of the Python back end (Triton's package has no
other) and an ensemble.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

DATATYPES = (
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES"
)  # fmt: skip

_IDENTITY = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor("OUTPUT0", pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy())]
            )
            for request in requests
        ]
"""
_TYPES = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            tensors = [
                pb_utils.Tensor(tensor.name().replace("IN_", "OUT_"), tensor.as_numpy()) for tensor in request.inputs()
            ]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses
"""
_ADD_SUB = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.factor = int(args["model_version"])

    def execute(self, requests):
        responses = []
        for request in requests:
            first = pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy()
            second = pb_utils.get_input_tensor_by_name(request, "INPUT1").as_numpy()
            outputs = [
                pb_utils.Tensor("OUTPUT0", self.factor * (first + second)),
                pb_utils.Tensor("OUTPUT1", first - second),
            ]
            responses.append(pb_utils.InferenceResponse(outputs))
        return responses
"""
_REPEAT = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            count = int(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy().reshape(-1)[0])
            sender = request.get_response_sender()
            for index in range(abs(count)):
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.array([index], np.int32))]))
            if count < 0:
                sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("gave up")))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
_ACCUMULATE = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.totals = {}

    def execute(self, requests):
        responses = []
        for request in requests:
            key = request.correlation_id()
            value = int(pb_utils.get_input_tensor_by_name(request, "INPUT").as_numpy().reshape(-1)[0])
            start = int(pb_utils.get_input_tensor_by_name(request, "START").as_numpy().reshape(-1)[0])
            self.totals[key] = value + (0 if start else self.totals.get(key, 0))
            total = np.array([[self.totals[key]]], np.int32)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", total)]))
        return responses
"""
_TEXT = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            text = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy().reshape(-1)[0].decode()
            count = pb_utils.get_input_tensor_by_name(request, "max_tokens")
            limit = int(count.as_numpy().reshape(-1)[0]) if count is not None else 100
            output = np.array([[text.upper()[:limit]]], dtype=object)
            scores = np.array([[0.5, -1.25]], np.float32)
            tensors = [pb_utils.Tensor("text_output", output), pb_utils.Tensor("scores", scores)]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses
"""
_FAILING = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse(error=pb_utils.TritonError("no luck")) for _ in requests]
"""


def _type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def _tensor(kind: str, name: str, datatype: str, dims: str, extra: str = "") -> str:
    return f'{kind} [ {{ name: "{name}" data_type: {_type(datatype)} dims: [ {dims} ] {extra} }} ]\n'


def _write(root: Path, name: str, code: str, config: str, versions: Sequence[str] = ("1",)) -> Path:
    folder = root / name
    for version in versions:
        (folder / version).mkdir(parents=True)
        if code:
            (folder / version / "model.py").write_text(code)
    kind = 'backend: "python"\ninstance_group [ { count: 1 kind: KIND_CPU } ]\n' if code else ""
    (folder / "config.pbtxt").write_text(f'name: "{name}"\n{kind}{config}')
    return folder


def write_models(root: Path) -> None:
    """Everything that the requests of `cases.py` name."""
    pair = _tensor("input", "INPUT0", "INT32", "16") + _tensor("input", "INPUT1", "INT32", "16")
    sums = _tensor("output", "OUTPUT0", "INT32", "16", 'label_filename: "labels.txt"')
    differences = _tensor("output", "OUTPUT1", "INT32", "16")
    simple = _write(root, "simple", _ADD_SUB, f"max_batch_size: 8\n{pair}{sums}{differences}")
    (simple / "labels.txt").write_text("".join(f"label{index}\n" for index in range(10)))
    plain = _tensor("output", "OUTPUT0", "INT32", "16") + differences
    _write(
        root,
        "versions",
        _ADD_SUB,
        f"max_batch_size: 8\nversion_policy {{ specific {{ versions: [1, 3] }} }}\n{pair}{plain}",
        ("1", "2", "3"),
    )
    identity = (
        "max_batch_size: 0\n" + _tensor("input", "INPUT0", "FP32", "-1") + _tensor("output", "OUTPUT0", "FP32", "-1")
    )
    _write(root, "identity", _IDENTITY, identity)
    types = "".join(_tensor("input", f"IN_{kind}", kind, "-1", "optional: true") for kind in DATATYPES)
    types += "".join(_tensor("output", f"OUT_{kind}", kind, "-1") for kind in DATATYPES)
    _write(root, "types", _TYPES, types)
    reshape = (
        "max_batch_size: 4\n"
        + _tensor("input", "INPUT0", "FP32", "2, -1")
        + _tensor("output", "OUTPUT0", "FP32", "2, -1")
    )
    _write(root, "matrix", _IDENTITY, reshape)
    repeat = "model_transaction_policy { decoupled: true }\n" + _tensor("input", "IN", "INT32", "1")
    _write(root, "repeat", _REPEAT, repeat + _tensor("output", "OUT", "INT32", "1"))
    control = (
        'sequence_batching { max_sequence_idle_microseconds: 60000000 direct { } control_input [ { name: "START" '
        "control [ { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } ] } ] }\n"
    )
    accumulate = _tensor("input", "INPUT", "INT32", "1") + _tensor("output", "OUTPUT", "INT32", "1")
    _write(root, "accumulate", _ACCUMULATE, f"max_batch_size: 4\n{control}{accumulate}")
    text = _tensor("input", "text_input", "BYTES", "1") + _tensor("input", "max_tokens", "INT32", "1", "optional: true")
    text += _tensor("output", "text_output", "BYTES", "1") + _tensor("output", "scores", "FP32", "2")
    _write(root, "text", _TEXT, f"max_batch_size: 4\n{text}")
    failing = _tensor("input", "IN", "INT32", "1") + _tensor("output", "OUT", "INT32", "1")
    _write(root, "failing", _FAILING, failing)
    steps = """ensemble_scheduling { step [
      { model_name: "simple" model_version: -1
        input_map { key: "INPUT0" value: "A" } input_map { key: "INPUT1" value: "B" }
        output_map { key: "OUTPUT0" value: "S" } output_map { key: "OUTPUT1" value: "D" } },
      { model_name: "simple" model_version: -1
        input_map { key: "INPUT0" value: "S" } input_map { key: "INPUT1" value: "D" }
        output_map { key: "OUTPUT0" value: "C" } } ] }
    """
    members = (
        _tensor("input", "A", "INT32", "16")
        + _tensor("input", "B", "INT32", "16")
        + _tensor("output", "C", "INT32", "16")
    )
    _write(root, "ensemble", "", f'platform: "ensemble"\nmax_batch_size: 8\n{members}{steps}')
