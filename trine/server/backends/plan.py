"""plan: models that `trine build` compiled (`model.plan`), and ONNX models that ask to be compiled when loaded.

All instances share one plan: its weights are mapped from the file once, and its runs don't stand in each other's way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from trine.core.errors import ModelLoadError, TrineError
from trine.server.backends.base import Device, ModelFiles
from trine.server.backends.compilation import compiled, device_of
from trine.server.backends.file_tensors import (
    FileTensor,
    check_tensors,
    complete_tensors,
    decoded_text,
    is_complete,
)
from trine.server.configuration.types import datatype_name
from trine.server.errors import ServerError
from trine.server.proto import pb
from trine.server.tensors import Array

if TYPE_CHECKING:
    from trine.graph import Plan
    from trine.graph.ir import Graph, Value

ModelConfig = Any
T = TypeVar("T")

_DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "bfloat16": "BF16",
    "string": "BYTES",
}


class PlanBackend:
    """Back end `plan` (`tensorrt` is another name for it)."""

    name = "plan"

    def __init__(self, settings: dict[str, str]) -> None:
        self._settings = settings
        self._opened: dict[Path, Plan] = {}

    def complete(self, config: ModelConfig, files: ModelFiles) -> None:
        """Inputs, outputs, batching and device as the plan has them, where the configuration leaves them out."""
        path = self._path(config, files)
        if path.suffix == ".onnx":  # compiled when it is loaded: for the batch that the configuration then has
            graph, on_cpu = _guarded(config, path, _read_model), device_of(config) == "cpu"
        else:
            plan = self._opened[files.version_directory] = self._open(config, path)
            graph, on_cpu = plan.graph, plan.device == "cpu"
        if on_cpu:
            _run_on_cpu(config)
        if not is_complete(config):
            complete_tensors(config, *_interface(graph), self._settings)

    def load(self, config: ModelConfig, files: ModelFiles) -> PlanModel:
        plan = self._opened.pop(files.version_directory, None) or self._open(config, self._path(config, files))
        return PlanModel(config, plan)

    def _path(self, config: ModelConfig, files: ModelFiles) -> Path:
        path = files.version_directory / (config.default_model_filename or "model.plan")
        if not path.is_file():
            raise ModelLoadError(
                f"model '{config.name}': there is no file {path}: make one with `trine build model.onnx "
                f"-o {path.name}`, or name it in default_model_filename"
            )
        return path

    def _open(self, config: ModelConfig, path: Path) -> Plan:
        """The plan in a file, or of the ONNX model there. ModelLoadError says what is wrong."""
        if path.suffix == ".onnx":
            return _guarded(config, path, lambda file: compiled(config, file, self._settings))
        from trine import graph

        return _guarded(config, path, graph.load_plan)


def _guarded(config: ModelConfig, path: Path, read: Callable[[Path], T]) -> T:
    """What `read` makes of the file; its errors name the model."""
    try:
        return read(path)
    except TrineError as error:
        raise ModelLoadError(f"model '{config.name}': {error.message}") from error


def _read_model(path: Path) -> Graph:
    from trine.graph.importer import import_model

    return import_model(path)


class PlanModel:
    """A plan, which every instance runs."""

    def __init__(self, config: ModelConfig, plan: Plan) -> None:
        check_tensors(config, *_interface(plan.graph))
        self._config = config
        self._plan = plan

    def instance(self, device: Device, index: int) -> PlanInstance:
        where = "cpu" if device.kind != "cuda" else f"cuda:{device.index}"
        if (where == "cpu") != (self._plan.device == "cpu") or self._plan.device not in ("cuda", "cpu", where):
            raise ModelLoadError(
                f"model '{self._config.name}': the plan is built for {self._plan.device}, the instance is to run on "
                f"{where}: change instance_group, or build the plan with --device {where}"
            )
        return PlanInstance(self._plan, self._config)

    def close(self) -> None:
        """Nothing but memory is held, which goes with the last instance."""


class PlanInstance:
    """Runs the plan; any number of threads may."""

    def __init__(self, plan: Plan, config: ModelConfig) -> None:
        self._run: Any = plan.run
        self._name: str = config.name
        kinds = {tensor.name: datatype_name(tensor.data_type) for tensor in config.input}
        self._bfloat16 = {name for name, kind in kinds.items() if kind == "BF16"}
        self._strings = {name for name, kind in kinds.items() if kind == "BYTES"}

    def execute(self, inputs: dict[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        for name in self._bfloat16 & inputs.keys():
            import ml_dtypes

            inputs[name] = inputs[name].view(ml_dtypes.bfloat16)
        for name in self._strings & inputs.keys():
            inputs[name] = decoded_text(inputs[name])
        try:
            results = self._run(inputs)
        except TrineError as error:
            raise ServerError(f"model '{self._name}': {error.message}") from error
        return {name: _to_server(results[name]) for name in outputs}

    def close(self) -> None:
        """Let go of the plan: whoever closes last frees it, and that is not the event loop's thread."""
        self._run = None


def _run_on_cpu(config: ModelConfig) -> None:
    """Instances that may run anywhere run where the plan does, whatever the machine has."""
    kinds = pb.ModelInstanceGroup.Kind
    if not config.instance_group:
        config.instance_group.add()
    for group in config.instance_group:
        if group.kind == kinds.Value("KIND_AUTO") and not group.gpus:
            group.kind = kinds.Value("KIND_CPU")


def _to_server(array: Array) -> Array:
    """BF16 travels as its bits."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def _interface(graph: Graph) -> tuple[list[FileTensor], list[FileTensor]]:
    """The inputs and outputs, by the names that callers use."""
    outputs = zip(graph.output_names, graph.outputs, strict=True)
    return [_tensor(value.name, value) for value in graph.inputs], [_tensor(name, value) for name, value in outputs]


def _tensor(name: str, value: Value) -> FileTensor:
    kind = str(value.dtype)
    shape = tuple(dim if isinstance(dim, int) else -1 for dim in value.shape or ())
    return FileTensor(name, _DATATYPES.get(kind, kind), shape)
