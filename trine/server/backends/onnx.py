"""onnx: models run by ONNX Runtime. All instances on one device share a session, so weights are in memory once.

Parameters of the configuration: intra_op_thread_count, inter_op_thread_count, execution_mode (0 sequential, 1
parallel), and `session.*` entries, which go to ONNX Runtime as they are. A model with the execution accelerator `trine`
is compiled and run as a plan instead (`compilation.py`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trine.core.errors import ConfigurationError, ModelLoadError
from trine.server.backends.base import Device, ModelFiles
from trine.server.backends.compilation import accelerator_of
from trine.server.backends.file_tensors import (
    FileTensor,
    check_tensors,
    complete_tensors,
    decoded_text,
    is_complete,
)
from trine.server.backends.plan import PlanBackend, PlanModel
from trine.server.configuration.types import datatype_name
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
        self._plans = PlanBackend(settings)
        """Of models that ask to be compiled."""

    def complete(self, config: ModelConfig, files: ModelFiles) -> None:
        """Inputs, outputs and batching as the model file has them, where the configuration leaves them out."""
        if accelerator_of(config) is not None:
            self._plans.complete(config, files)
            return
        if is_complete(config):
            return
        session = self._opened[files.version_directory] = _open(config, files, Device("cpu"))
        complete_tensors(config, _tensors(session.get_inputs()), _tensors(session.get_outputs()), self._settings)

    def load(self, config: ModelConfig, files: ModelFiles) -> OnnxModel | PlanModel:
        if accelerator_of(config) is not None:
            return self._plans.load(config, files)
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
        session = self._session(Device("cuda") if _on_gpu(config) else Device("cpu"))
        check_tensors(config, _tensors(session.get_inputs()), _tensors(session.get_outputs()))

    def _session(self, device: Device) -> Any:
        with self._lock:
            if device not in self._sessions:
                self._sessions[device] = _open(self._config, self._files, device)
            return self._sessions[device]

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
                inputs[name] = decoded_text(inputs[name])
        try:
            return dict(zip(outputs, self._run(outputs, inputs), strict=True))
        except Exception as error:
            raise ServerError(f"onnx runtime error in model '{self._name}': {error}", Code.INTERNAL) from error

    def close(self) -> None:
        """Let go of the session: whoever closes last frees it, and that is not the event loop's thread."""
        self._run = None


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


def _tensors(ports: Iterable[Any]) -> list[FileTensor]:
    """A session's inputs or outputs."""
    return [FileTensor(port.name, _DATATYPES.get(port.type, port.type), tuple(map(_dim, port.shape))) for port in ports]


def _dim(dim: Any) -> int:
    """A number, or -1 where it has a name or none."""
    return dim if isinstance(dim, int) and dim >= 0 else -1
