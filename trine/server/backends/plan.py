"""plan: models that `trine build` compiled (`model.plan`), and ONNX models that ask to be compiled when loaded.

All instances share one plan: its weights are mapped from the file once, and its runs don't stand in each other's way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trine.core.errors import ModelLoadError, TrineError
from trine.server.backends.base import Device, ModelFiles
from trine.server.backends.compilation import compiled
from trine.server.backends.file_tensors import (
    FileTensor,
    check_tensors,
    complete_tensors,
    decoded_text,
    is_complete,
)
from trine.server.configuration.types import datatype_name
from trine.server.errors import ServerError
from trine.server.tensors import Array

if TYPE_CHECKING:
    from trine.graph import Plan

ModelConfig = Any

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
        """Inputs, outputs and batching as the plan has them, where the configuration leaves them out."""
        if is_complete(config):
            return
        plan = self._opened[files.version_directory] = self.open(config, files)
        complete_tensors(config, *_interface(plan), self._settings)

    def load(self, config: ModelConfig, files: ModelFiles) -> PlanModel:
        plan = self._opened.pop(files.version_directory, None) or self.open(config, files)
        return PlanModel(config, plan)

    def open(self, config: ModelConfig, files: ModelFiles) -> Plan:
        """The plan in the version's directory, or of the ONNX model there. ModelLoadError says what is wrong."""
        path = files.version_directory / (config.default_model_filename or "model.plan")
        if not path.is_file():
            raise ModelLoadError(
                f"model '{config.name}': there is no file {path}: make one with `trine build model.onnx "
                f"-o {path.name}`, or name it in default_model_filename"
            )
        from trine import graph

        try:
            return compiled(config, path, self._settings) if path.suffix == ".onnx" else graph.load_plan(path)
        except TrineError as error:
            raise ModelLoadError(f"model '{config.name}': {error.message}") from error


class PlanModel:
    """A plan, which every instance runs."""

    def __init__(self, config: ModelConfig, plan: Plan) -> None:
        check_tensors(config, *_interface(plan))
        self._config = config
        self._plan = plan

    def instance(self, device: Device, index: int) -> PlanInstance:
        if device.kind == "cuda":
            raise ModelLoadError(f"model '{self._config.name}': plans run on the CPU: use KIND_CPU in instance_group")
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


def _to_server(array: Array) -> Array:
    """BF16 travels as its bits."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def _interface(plan: Plan) -> tuple[list[FileTensor], list[FileTensor]]:
    """The plan's inputs and outputs."""
    facts = plan.inspect()
    return [_tensor(each) for each in facts["inputs"]], [_tensor(each) for each in facts["outputs"]]


def _tensor(described: dict[str, Any]) -> FileTensor:
    kind = str(described["dtype"])
    shape = tuple(dim if isinstance(dim, int) else -1 for dim in described["shape"] or ())
    return FileTensor(described["name"], _DATATYPES.get(kind, kind), shape)
