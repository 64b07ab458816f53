"""onnx: models run by ONNX Runtime. All instances on one device share a session, so weights are in memory once.

Parameters of the configuration: intra_op_thread_count, inter_op_thread_count, execution_mode (0 sequential, 1
parallel), and `session.*` entries, which go to ONNX Runtime as they are.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trine.core.errors import ConfigurationError, ModelLoadError
from trine.server.backends.base import Device, ModelFiles
from trine.server.configuration.complete import default_max_batch_size
from trine.server.configuration.types import datatype_name, datatype_number
from trine.server.errors import Code, ServerError
from trine.server.tensors import Array

ModelConfig = Any

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
    "tensor(bfloat16)": "BF16",
}
_OPTIMIZATION_LEVELS = {-1: "ORT_DISABLE_ALL", 1: "ORT_ENABLE_BASIC", 2: "ORT_ENABLE_EXTENDED"}


class OnnxBackend:
    name = "onnxruntime"

    def __init__(self, settings: dict[str, str]) -> None:
        self._settings = settings
        self._opened: dict[Path, Any] = {}

    def complete(self, config: ModelConfig, files: ModelFiles) -> None:
        """Inputs, outputs and batching as the model file has them, where the configuration leaves them out."""
        if _is_complete(config):
            return
        session = self._opened[files.version_directory] = _open(config, files, Device("cpu"))
        inputs, outputs = list(session.get_inputs()), list(session.get_outputs())
        batches = all(_is_batched(tensor) for tensor in (*inputs, *outputs))
        if not config.input and not config.output and config.max_batch_size == 0 and batches:
            config.max_batch_size = default_max_batch_size(self._settings)
            scheduled = config.HasField("dynamic_batching") or config.HasField("sequence_batching")
            if config.max_batch_size > 1 and not scheduled:
                config.dynamic_batching.SetInParent()
        controls = {control.name for control in config.sequence_batching.control_input}
        controls |= {state.input_name for state in config.sequence_batching.state}
        controls |= {name for item in config.batch_input for name in item.target_name}
        states = {state.output_name for state in config.sequence_batching.state}
        _fill(config, config.input, [tensor for tensor in inputs if tensor.name not in controls])
        _fill(config, config.output, [tensor for tensor in outputs if tensor.name not in states])

    def load(self, config: ModelConfig, files: ModelFiles) -> OnnxModel:
        opened = self._opened.pop(files.version_directory, None)
        return OnnxModel(config, files, None if _on_gpu(config) else opened)


class OnnxModel:
    """A model file; sessions are made per device, when its first instance is."""

    def __init__(self, config: ModelConfig, files: ModelFiles, opened: Any | None) -> None:
        """`opened`: the session on the CPU that completing the configuration has made."""
        self._config = config
        self._files = files
        self._sessions: dict[Device, Any] = {} if opened is None else {Device("cpu"): opened}
        self._lock = threading.Lock()
        self._check(self._session(Device("cuda") if _on_gpu(config) else Device("cpu")))

    def _session(self, device: Device) -> Any:
        with self._lock:
            if device not in self._sessions:
                self._sessions[device] = _open(self._config, self._files, device)
            return self._sessions[device]

    def _check(self, session: Any) -> None:
        """The configuration's tensors are the model's."""
        config = self._config
        given = {tensor.name: tensor for tensor in session.get_inputs()}
        answers = {tensor.name: tensor for tensor in session.get_outputs()}
        extra = {name for item in config.batch_input for name in item.target_name}
        extra |= {control.name for control in config.sequence_batching.control_input}
        extra |= {state.input_name for state in config.sequence_batching.state}
        configured = {tensor.name for tensor in config.input} | extra
        for kind, tensors, known in (("input", config.input, given), ("output", config.output, answers)):
            for tensor in tensors:
                _check_tensor(config, kind, tensor, known)
        if missing := sorted(set(given) - configured):
            raise ConfigurationError(
                f"model '{config.name}': the model file has the inputs {missing} that the configuration lacks: "
                f"expected {len(given)} inputs, got {len(config.input)}"
            )

    def instance(self, device: Device, index: int) -> OnnxInstance:
        return OnnxInstance(self._session(device), self._config)

    def close(self) -> None:
        self._sessions.clear()


class OnnxInstance:
    """Runs the device's session; ONNX Runtime allows any number of threads to."""

    def __init__(self, session: Any, config: ModelConfig) -> None:
        self._run: Any = session.run
        self._strings = [tensor.name for tensor in config.input if datatype_name(tensor.data_type) == "BYTES"]
        self._name: str = config.name

    def execute(self, inputs: dict[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        for name in self._strings:
            if name in inputs:
                inputs[name] = _decoded(inputs[name])
        try:
            return dict(zip(outputs, self._run(outputs, inputs), strict=True))
        except Exception as error:
            raise ServerError(f"onnx runtime error in model '{self._name}': {error}", Code.INTERNAL) from error

    def close(self) -> None:
        """Let go of the session: whoever closes last frees it, and that is not the event loop's thread."""
        self._run = None


def _decoded(array: Array) -> Array:
    """ONNX Runtime takes strings as `str`; bytes that are no UTF-8 can't be one."""
    flat = array.reshape(-1)
    try:
        decoded = np.array([item.decode() if isinstance(item, bytes) else item for item in flat], dtype=object)
    except UnicodeDecodeError as error:
        raise ServerError(f"a string of the request is not UTF-8: {error}") from error
    return decoded.reshape(array.shape)


def _is_complete(config: ModelConfig) -> bool:
    """Whether nothing is left that the model file would have to tell."""
    tensors = [*config.input, *config.output]
    return bool(config.input and config.output) and all(tensor.data_type and tensor.dims for tensor in tensors)


def _on_gpu(config: ModelConfig) -> bool:
    return bool(config.instance_group) and all(group.gpus for group in config.instance_group)


def model_path(config: ModelConfig, files: ModelFiles) -> Path:
    """The model's file: `default_model_filename`, or the .onnx inside of it where it is a directory."""
    path = files.version_directory / (config.default_model_filename or "model.onnx")
    if path.is_dir():
        inside = path / "model.onnx"
        return inside if inside.exists() else next(iter(sorted(path.glob("*.onnx"))), inside)
    if not path.exists():
        raise ModelLoadError(
            f"model '{config.name}': there is no file {path}: put the model there, or name it in default_model_filename"
        )
    return path


def _open(config: ModelConfig, files: ModelFiles, device: Device) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ModelLoadError("back end onnxruntime needs the package onnxruntime: pip install onnxruntime") from error
    path = model_path(config, files)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    options.intra_op_num_threads = _integer(config, parameters, "intra_op_thread_count", 0)
    options.inter_op_num_threads = _integer(config, parameters, "inter_op_thread_count", 0)
    if _integer(config, parameters, "execution_mode", 0):
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    level = _OPTIMIZATION_LEVELS.get(config.optimization.graph.level)
    if level is not None:
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    # A thread that spins while it has nothing to do takes a core from the server and from other models.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    for key, value in parameters.items():
        if key.startswith("session."):
            options.add_session_config_entry(key, value)
    try:
        return ort.InferenceSession(os.fspath(path), options, providers=_providers(config, device, ort))
    except Exception as error:
        raise ModelLoadError(f"model '{config.name}': ONNX Runtime can't load {path}: {error}") from error


def _providers(config: ModelConfig, device: Device, ort: Any) -> list[Any]:
    if device.kind == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise ModelLoadError(
            f"model '{config.name}' is to run on GPU {device.index}, but this ONNX Runtime has no CUDA provider: "
            "install onnxruntime-gpu, or use KIND_CPU"
        )
    return [("CUDAExecutionProvider", {"device_id": device.index}), "CPUExecutionProvider"]


def _integer(config: ModelConfig, parameters: dict[str, str], key: str, default: int) -> int:
    text = parameters.get(key)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigurationError(f"model '{config.name}': parameter {key}={text!r} is not an integer") from None


def _is_batched(tensor: Any) -> bool:
    """Whether the first dimension is variable, so that it can be the batch."""
    return bool(tensor.shape) and not (isinstance(tensor.shape[0], int) and tensor.shape[0] >= 0)


def _dims(tensor: Any) -> list[int]:
    return [dim if isinstance(dim, int) and dim >= 0 else -1 for dim in tensor.shape]


def _datatype(tensor: Any) -> str:
    datatype = _DATATYPES.get(tensor.type)
    if datatype is None:
        raise ModelLoadError(f"tensor '{tensor.name}' is {tensor.type}, which the protocol can't carry")
    return datatype


def _fill(config: ModelConfig, configured: Any, actual: list[Any]) -> None:
    """Add the tensors that are not configured; give the others the type and dims they lack."""
    by_name = {tensor.name: tensor for tensor in configured}
    if configured and not set(by_name) <= {tensor.name for tensor in actual}:
        return  # names that are wrong are for `load` to report
    for tensor in actual:
        message = by_name.get(tensor.name)
        if message is None:
            if by_name:
                continue
            message = configured.add(name=tensor.name)
        if not message.data_type:
            message.data_type = datatype_number(_datatype(tensor))
        if not message.dims:
            dims = _dims(tensor)
            dims = dims[1:] if config.max_batch_size else dims
            if dims:
                message.dims.extend(dims)
            else:
                message.dims.append(1)
                message.reshape.SetInParent()


def _check_tensor(config: ModelConfig, kind: str, tensor: Any, known: dict[str, Any]) -> None:
    actual = known.get(tensor.name)
    if actual is None:
        raise ConfigurationError(
            f"model '{config.name}': {kind} '{tensor.name}' is not in the model file, which has {sorted(known)}"
        )
    datatype = _datatype(actual)
    if datatype_name(tensor.data_type) != datatype:
        raise ConfigurationError(
            f"model '{config.name}': {kind} '{tensor.name}' is {datatype} in the model file, the configuration says "
            f"{datatype_name(tensor.data_type)}"
        )
    if not actual.shape:
        return  # a scalar, or a shape that the file leaves open
    dims = list(tensor.reshape.shape) if tensor.HasField("reshape") else list(tensor.dims)
    scattered = {name for item in config.batch_output for name in item.target_name}
    if config.max_batch_size and not getattr(tensor, "allow_ragged_batch", False) and tensor.name not in scattered:
        dims = [-1, *dims]
        if not _is_batched(actual):
            raise ConfigurationError(
                f"model '{config.name}': max_batch_size is {config.max_batch_size}, but the first dimension of {kind} "
                f"'{tensor.name}' in the model file is {actual.shape[0]}: set max_batch_size to 0, or export the model "
                "with a variable batch dimension"
            )
    elif config.max_batch_size:
        return
    have = _dims(actual)
    if len(have) != len(dims) or any(-1 not in pair and pair[0] != pair[1] for pair in zip(have, dims, strict=True)):
        raise ConfigurationError(
            f"model '{config.name}': {kind} '{tensor.name}' has shape {have} in the model file, the configuration says "
            f"{dims}"
        )
