"""openvino: models in OpenVINO's format (`model.xml` with `model.bin` beside it). Instances share the compiled model.

Parameters of the configuration: INFERENCE_NUM_THREADS, NUM_STREAMS (a number or "auto"), PERFORMANCE_HINT (LATENCY,
THROUGHPUT), TARGET_DEVICE (default CPU), and any property of OpenVINO by its own name.
"""

from __future__ import annotations

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
    "boolean": "BOOL",
    "u8": "UINT8",
    "u16": "UINT16",
    "u32": "UINT32",
    "u64": "UINT64",
    "i8": "INT8",
    "i16": "INT16",
    "i32": "INT32",
    "i64": "INT64",
    "f16": "FP16",
    "f32": "FP32",
    "f64": "FP64",
    "bf16": "BF16",
    "string": "BYTES",
}
_ACCEPTED = {"SKIP_OV_DYNAMIC_BATCHSIZE", "ENABLE_BATCH_PADDING", "RESHAPE_IO_LAYERS", "DISABLE_PENDING_COMPILATION"}
"""Triton's parameters that have nothing to do here: dynamic batches are OpenVINO's own."""


class OpenvinoBackend:
    name = "openvino"

    def __init__(self, settings: dict[str, str]) -> None:
        self._settings = settings

    def complete(self, config: ModelConfig, files: ModelFiles) -> None:
        """Inputs, outputs and batching as the model file has them, where the configuration leaves them out."""
        model = _read(config, model_path(config, files))
        batches = all(_shape(port)[:1] == [-1] for port in (*model.inputs, *model.outputs))
        if not config.input and not config.output and not config.max_batch_size and batches:
            config.max_batch_size = default_max_batch_size(self._settings)
            if config.max_batch_size > 1 and not config.HasField("sequence_batching"):
                config.dynamic_batching.SetInParent()
        for configured, ports in ((config.input, model.inputs), (config.output, model.outputs)):
            if configured:
                continue
            for port in ports:
                shape = _shape(port)
                dims = shape[1:] if config.max_batch_size else shape
                number = datatype_number(_datatype(port))
                message = configured.add(name=port.get_any_name(), data_type=number, dims=dims or [1])
                if not dims:
                    message.reshape.SetInParent()

    def load(self, config: ModelConfig, files: ModelFiles) -> OpenvinoModel:
        return OpenvinoModel(config, model_path(config, files))


def model_path(config: ModelConfig, files: ModelFiles) -> Path:
    path = files.version_directory / (config.default_model_filename or "model.xml")
    if not path.exists():
        raise ModelLoadError(
            f"model '{config.name}': there is no file {path}: put model.xml and model.bin there, or name the model's "
            "file in default_model_filename"
        )
    return path


class OpenvinoModel:
    """A compiled model."""

    def __init__(self, config: ModelConfig, path: Path) -> None:
        self._config = config
        self._lock = threading.Lock()
        model = _read(config, path)
        for kind, tensors, ports in (("input", config.input, model.inputs), ("output", config.output, model.outputs)):
            _check(config, kind, tensors, ports)
        device, properties = _properties(config)
        try:
            self._compiled: Any = _openvino().Core().compile_model(model, device, properties)
        except Exception as error:
            raise ModelLoadError(f"model '{config.name}': OpenVINO can't compile {path}: {_short(error)}") from error

    def instance(self, device: Device, index: int) -> OpenvinoInstance:
        if device.kind == "cuda":
            raise ModelLoadError(f"model '{self._config.name}': OpenVINO runs on the CPU here: use KIND_CPU")
        with self._lock:
            return OpenvinoInstance(self._compiled.create_infer_request(), self._config)

    def close(self) -> None:
        self._compiled = None


class OpenvinoInstance:
    """One infer request of the compiled model."""

    def __init__(self, request: Any, config: ModelConfig) -> None:
        self._request = request
        self._name: str = config.name
        self._bfloat16 = {tensor.name for tensor in config.input if datatype_name(tensor.data_type) == "BF16"}
        self._strings = {tensor.name for tensor in config.output if datatype_name(tensor.data_type) == "BYTES"}

    def execute(self, inputs: dict[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        try:
            for name, array in inputs.items():
                self._request.set_tensor(name, self._tensor(name, array))
            self._request.infer()
            return {name: self._array(name) for name in outputs}
        except Exception as error:
            raise ServerError(f"OpenVINO error in model '{self._name}': {_short(error)}", Code.INTERNAL) from error

    def close(self) -> None:
        del self._request

    def _tensor(self, name: str, array: Array) -> Any:
        openvino = _openvino()
        if name in self._bfloat16:
            return openvino.Tensor(np.ascontiguousarray(array), array.shape, openvino.Type.bf16)
        if array.dtype == object:
            return openvino.Tensor(np.array([_bytes(item) for item in array.reshape(-1)]).reshape(array.shape))
        return openvino.Tensor(np.ascontiguousarray(array), shared_memory=array.flags.writeable)

    def _array(self, name: str) -> Array:
        """A copy: the request's own memory is written again by the next batch."""
        tensor = self._request.get_tensor(name)
        if name in self._strings:
            texts = tensor.str_data
            strings = np.empty(texts.size, dtype=object)
            strings[:] = [text.encode() for text in texts.reshape(-1)]
            return strings.reshape(texts.shape)
        array: Array = tensor.data
        return np.array(array.view(np.uint16) if array.dtype.itemsize == 2 and array.dtype.kind == "V" else array)


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise ModelLoadError("back end openvino needs the package openvino: pip install openvino") from error
    return openvino


def _read(config: ModelConfig, path: Path) -> Any:
    try:
        return _openvino().Core().read_model(str(path))
    except RuntimeError as error:
        raise ModelLoadError(f"model '{config.name}': OpenVINO can't read {path}: {_short(error)}") from error


def _properties(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The device, and OpenVINO's properties."""
    parameters = {key: value.string_value for key, value in config.parameters.items() if key not in _ACCEPTED}
    device = parameters.pop("TARGET_DEVICE", "CPU")
    properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    for key, text in parameters.items():
        properties[key] = "AUTO" if key == "NUM_STREAMS" and text.lower() == "auto" else text
    threads = properties.get("INFERENCE_NUM_THREADS")
    if threads is not None and not str(threads).isdigit():
        raise ConfigurationError(
            f"model '{config.name}': parameter INFERENCE_NUM_THREADS={threads!r}: expected a number"
        )
    return device, properties


def _shape(port: Any) -> list[int]:
    if port.partial_shape.rank.is_dynamic:
        return [-1]
    return [-1 if dimension.is_dynamic else dimension.get_length() for dimension in port.partial_shape]


def _datatype(port: Any) -> str:
    name = port.element_type.get_type_name()
    datatype = _DATATYPES.get(name)
    if datatype is None:
        raise ModelLoadError(f"tensor '{port.get_any_name()}' is {name}, which the protocol can't carry")
    return datatype


def _check(config: ModelConfig, kind: str, tensors: Any, ports: Any) -> None:
    """The configured tensors are the model's, in name, datatype and shape."""
    known = {name: port for port in ports for name in port.get_names()}
    for tensor in tensors:
        port = known.get(tensor.name)
        if port is None:
            raise ConfigurationError(
                f"model '{config.name}': {kind} '{tensor.name}' is not in the model file, which has {sorted(known)}"
            )
        if datatype_name(tensor.data_type) != _datatype(port):
            raise ConfigurationError(
                f"model '{config.name}': {kind} '{tensor.name}' is {_datatype(port)} in the model file, the "
                f"configuration says {datatype_name(tensor.data_type)}"
            )
        dims = list(tensor.reshape.shape) if tensor.HasField("reshape") else list(tensor.dims)
        dims = [-1, *dims] if config.max_batch_size else dims
        have = _shape(port)
        if port.partial_shape.rank.is_static and not _fits(dims, have):
            raise ConfigurationError(
                f"model '{config.name}': {kind} '{tensor.name}' has shape {have} in the model file, the configuration "
                f"says {dims}"
            )


def _fits(dims: list[int], shape: list[int]) -> bool:
    return len(dims) == len(shape) and all(-1 in pair or pair[0] == pair[1] for pair in zip(dims, shape, strict=True))


def _bytes(item: object) -> bytes:
    return item if isinstance(item, bytes) else str(item).encode()


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:1500]
