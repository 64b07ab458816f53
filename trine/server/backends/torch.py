"""torch: TorchScript (`model.pt`) and exported programs (`model.pt2`, of torch.export or compiled by AOTInductor).

Configured names are matched to the model's in Triton's ways, the first that fits all inputs: arguments of `forward`;
`NAME__INDEX`, the position; the configuration's order. A `forward` of one dictionary gets all inputs in it, by name.
Outputs are matched by the keys of a dictionary, by `NAME__INDEX`, else in order.

Parameters of the configuration: DISABLE_OPTIMIZED_EXECUTION, INFERENCE_MODE (default true), ENABLE_WEIGHT_SHARING (one
module for all instances on a device), INTRA_OP_THREAD_COUNT, INTER_OP_THREAD_COUNT (of the whole process).
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trine.core.errors import ConfigurationError, ModelLoadError
from trine.server.backends.base import Device, ModelFiles
from trine.server.configuration.complete import default_max_batch_size
from trine.server.configuration.types import datatype_name, datatype_number
from trine.server.errors import Code, ServerError
from trine.server.tensors import Array

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("trine.server")

ModelConfig = Any
Module = Callable[..., Any]

_POSITION = re.compile(r".+__(\d+)")
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
}
_export_lock = threading.Lock()
"""torch.export.load keeps what it works on in a global."""
_thread_counts: dict[str, int] = {}
"""What a configuration has set for the process."""


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of `forward`.

    kind: "tensor", "strings" (List[str]), "dictionary" (Dict[str, Tensor]), or "keyword": a tensor passed by name.
    """

    name: str
    kind: str = "tensor"
    datatype: str = ""
    shape: tuple[int, ...] = ()


class TorchBackend:
    name = "pytorch"

    def __init__(self, settings: dict[str, str]) -> None:
        self._settings = settings

    def complete(self, config: ModelConfig, files: ModelFiles) -> None:
        """Inputs and outputs of an exported program; TorchScript does not say what it takes."""
        path = model_path(config, files)
        if not is_exported_program(path):
            return
        inputs, outputs = signature(_load_exported(path, config))
        batches = all(tensor.shape[:1] == (-1,) for tensor in (*inputs, *outputs))
        if not config.input and not config.output and not config.max_batch_size and batches:
            config.max_batch_size = default_max_batch_size(self._settings)
            if config.max_batch_size > 1 and not config.HasField("sequence_batching"):
                config.dynamic_batching.SetInParent()
        for configured, tensors in ((config.input, inputs), (config.output, outputs)):
            if configured:
                continue
            for tensor in tensors:
                dims = tensor.shape[1:] if config.max_batch_size else tensor.shape
                message = configured.add(name=tensor.name, data_type=datatype_number(tensor.datatype), dims=dims or [1])
                if not dims:
                    message.reshape.SetInParent()

    def load(self, config: ModelConfig, files: ModelFiles) -> TorchModel:
        return TorchModel(config, model_path(config, files))


def model_path(config: ModelConfig, files: ModelFiles) -> Path:
    """The model's file: `default_model_filename`, or whichever of model.pt and model.pt2 is there."""
    wanted = config.default_model_filename or "model.pt"
    path = files.version_directory / wanted
    if not path.exists() and wanted == "model.pt":
        path = files.version_directory / "model.pt2"
    if not path.exists():
        raise ModelLoadError(
            f"model '{config.name}': there is no file {files.version_directory / wanted}: put the TorchScript model "
            "there (or model.pt2), or name it in default_model_filename"
        )
    return path


class TorchModel:
    """A model file. Each instance loads a module of its own, unless they are to share weights."""

    def __init__(self, config: ModelConfig, path: Path) -> None:
        self._config = config
        self._path = path
        self._lock = threading.Lock()
        self._shared: dict[Device, tuple[Module, list[Argument] | None]] = {}
        self._parameters = {key.upper(): value.string_value for key, value in config.parameters.items()}
        self._shares = _flag(config, self._parameters, "ENABLE_WEIGHT_SHARING", default=False)
        _set_threads(config, self._parameters)

    def instance(self, device: Device, index: int) -> TorchInstance:
        module, arguments = self._module(device)
        return TorchInstance(self._config, module, arguments, _torch_device(device), self._parameters)

    def _module(self, device: Device) -> tuple[Module, list[Argument] | None]:
        with self._lock:
            if self._shares and device in self._shared:
                return self._shared[device]
            loaded = load_module(self._path, self._config, _torch_device(device))
            if self._shares:
                self._shared[device] = loaded
            return loaded

    def close(self) -> None:
        self._shared.clear()


class TorchInstance:
    """A module on one device."""

    def __init__(
        self,
        config: ModelConfig,
        module: Module,
        arguments: list[Argument] | None,
        device: str,
        parameters: Mapping[str, str],
    ) -> None:
        import torch

        self._torch = torch
        self._name: str = config.name
        self._module = module
        self._device = device
        self._datatypes = {tensor.name: datatype_name(tensor.data_type) for tensor in (*config.input, *config.output)}
        self._pass_inputs = input_passing(config, arguments)
        self._positions = output_positions(config)
        self._inference = _flag(config, parameters, "INFERENCE_MODE", default=True)
        self._unoptimized = _flag(config, parameters, "DISABLE_OPTIMIZED_EXECUTION", default=False)

    def execute(self, inputs: dict[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        tensors = {name: self._tensor(name, array) for name, array in inputs.items()}
        positional, named = self._pass_inputs(tensors)
        torch = self._torch
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode() if self._inference else torch.no_grad())
            if self._unoptimized:
                stack.enter_context(torch.jit.optimized_execution(False))
            try:
                result = self._module(*positional, **named)
            except Exception as error:
                raise ServerError(f"PyTorch error in model '{self._name}': {_short(error)}", Code.INTERNAL) from error
        return {name: self._array(name, value) for name, value in self._named(result, outputs)}

    def close(self) -> None:
        del self._module

    def _tensor(self, name: str, array: Array) -> Any:
        """The input as a tensor, or as a list of strings. The request's own memory is copied: models may write."""
        if array.dtype == object:
            try:
                return [item.decode() if isinstance(item, bytes) else str(item) for item in array.reshape(-1)]
            except UnicodeDecodeError as error:
                raise ServerError(f"input '{name}': a string of the request is not UTF-8: {error}") from error
        tensor = self._torch.from_numpy(array if array.flags.writeable else array.copy())
        if self._datatypes.get(name) == "BF16":
            tensor = tensor.view(self._torch.bfloat16)
        return tensor if self._device == "cpu" else tensor.to(self._device)

    def _named(self, result: Any, outputs: Sequence[str]) -> list[tuple[str, Any]]:
        """The wanted ones of what `forward` returned."""
        if isinstance(result, Mapping):
            missing = [name for name in outputs if name not in result]
            if missing:
                raise self._error(f"returned no output {missing[0]!r}, its dictionary has {sorted(result)}")
            return [(name, result[name]) for name in outputs]
        is_strings = isinstance(result, list) and bool(result) and all(isinstance(item, str) for item in result)
        values = list(result) if isinstance(result, tuple | list) and not is_strings else [result]
        found = []
        for name in outputs:
            position = self._positions[name]
            if position >= len(values):
                raise self._error(f"returned {len(values)} outputs, '{name}' would be number {position}")
            found.append((name, values[position]))
        return found

    def _array(self, name: str, value: Any) -> Array:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            strings = np.empty(len(value), dtype=object)
            strings[:] = [item.encode() for item in value]
            return strings
        if not isinstance(value, self._torch.Tensor):
            raise self._error(f"returned a {type(value).__name__} for output '{name}': expected a tensor")
        datatype = _DATATYPES.get(str(value.dtype).removeprefix("torch."), str(value.dtype))
        expected = self._datatypes[name]
        if datatype != expected:
            raise self._error(
                f"configuration expects datatype {expected} for output '{name}', model provides {datatype}"
            )
        if datatype == "BF16":
            value = value.view(self._torch.int16)
        array: Array = value.detach().cpu().contiguous().numpy()
        return array.view(np.uint16) if datatype == "BF16" else array

    def _error(self, text: str) -> ServerError:
        return ServerError(f"model '{self._name}': {text}", Code.INTERNAL)


def load_module(path: Path, config: ModelConfig, device: str) -> tuple[Module, list[Argument] | None]:
    """The module on a device, ready to compute, and the arguments of its `forward` where they are known."""
    import torch

    if is_exported_program(path):
        program = _load_exported(path, config)
        inputs = exported_arguments(program)
        if device != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        return program.module(), inputs
    if _is_zip_with(path, "aotinductor/"):
        try:
            return torch._inductor.aoti_load_package(str(path)), None
        except Exception as error:
            raise ModelLoadError(f"model '{config.name}': PyTorch can't load {path}: {_short(error)}") from error
    try:
        script = torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise ModelLoadError(
            f"model '{config.name}': PyTorch can't load {path} as TorchScript: {_short(error)}. Save it with "
            "torch.jit.save(torch.jit.trace(model, example), path); weights alone (a state_dict) are no model"
        ) from error
    script.eval()
    return script, script_arguments(script)


def is_exported_program(path: Path) -> bool:
    """Whether the file is what torch.export.save wrote."""
    return _is_zip_with(path, "serialized_exported_program.json") or (
        _is_zip_with(path, "models/model.json") and not _is_zip_with(path, "aotinductor/")
    )


def _is_zip_with(path: Path, part: str) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return any(part in name for name in file.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _load_exported(path: Path, config: ModelConfig) -> torch.export.ExportedProgram:
    import torch

    try:
        with _export_lock:
            return torch.export.load(path)
    except Exception as error:
        raise ModelLoadError(
            f"model '{config.name}': PyTorch can't load {path} as an exported program: {_short(error)}"
        ) from error


def signature(program: torch.export.ExportedProgram) -> tuple[list[Argument], list[Argument]]:
    """Inputs and outputs of an exported program: names, datatypes, shapes (-1: any size)."""
    nodes = {node.name: node for node in program.graph.nodes}
    graph = program.graph_signature
    given = [str(name) for name in graph.user_inputs]
    arguments = exported_arguments(program)
    shown_inputs = given
    if [argument.kind for argument in arguments] == ["dictionary"]:
        shown_inputs = [str(key) for key in program.call_spec.in_spec.child(0).child(0).context]
    inputs = [
        _argument(shown, nodes[name].meta["val"])
        for shown, name in zip(shown_inputs, given, strict=True)
        if name in nodes
    ]
    names = _output_names(program, len(graph.user_outputs))
    outputs = [
        _argument(shown, nodes[str(name)].meta["val"])
        for shown, name in zip(names, graph.user_outputs, strict=True)
        if str(name) in nodes
    ]
    return inputs, outputs


def exported_arguments(program: torch.export.ExportedProgram) -> list[Argument]:
    """What an exported program's module is called with."""
    spec = program.call_spec.in_spec
    names = [str(name) for name in program.graph_signature.user_inputs]
    if spec is None:
        return [Argument(name) for name in names]
    positional, keywords = spec.child(0), spec.child(1)
    if positional.num_children == 1 and positional.child(0).type is dict and not keywords.num_children:
        return [Argument(names[0] if names else "", "dictionary")]
    by_name = {str(key) for key in keywords.context or ()}
    return [Argument(name, "keyword" if name in by_name else "tensor") for name in names]


def _output_names(program: torch.export.ExportedProgram, count: int) -> list[str]:
    """Keys of a returned dictionary, else OUTPUT__0, OUTPUT__1, …"""
    spec = program.call_spec.out_spec
    if spec is not None and spec.type is dict:
        return [str(key) for key in spec.context]
    return [f"OUTPUT__{index}" for index in range(count)]


def _argument(name: str, value: Any) -> Argument:
    shape = tuple(int(size) if isinstance(size, int) else -1 for size in value.shape)
    return Argument(name, "tensor", _DATATYPES[str(value.dtype).removeprefix("torch.")], shape)


def script_arguments(script: torch.jit.ScriptModule) -> list[Argument]:
    """The arguments of a TorchScript module's `forward`."""
    arguments = []
    forward: Any = script.forward
    for argument in forward.schema.arguments[1:]:
        text = argument.type.annotation_str.replace("typing.", "")
        kind = {"Dict[str, Tensor]": "dictionary", "List[str]": "strings"}.get(text, "tensor")
        arguments.append(Argument(argument.name, kind))
    return arguments


Passing = Callable[[dict[str, Any]], tuple[list[Any], dict[str, Any]]]


def input_passing(config: ModelConfig, arguments: list[Argument] | None) -> Passing:
    """How inputs are passed to `forward`. ConfigurationError where they can't be."""
    names = [tensor.name for tensor in config.input]
    names += [control.name for control in config.sequence_batching.control_input]
    names += [name for item in config.batch_input for name in item.target_name]
    if arguments is not None:
        if len(arguments) == 1 and arguments[0].kind == "dictionary":
            return lambda tensors: ([tensors], {})
        if set(names) <= {argument.name for argument in arguments}:
            return lambda tensors: _by_argument(arguments, tensors)
        if len(names) > len(arguments):
            raise ConfigurationError(
                f"model '{config.name}': {len(names)} inputs are configured, the model's forward takes "
                f"{len(arguments)}: {', '.join(argument.name for argument in arguments)}"
            )
    positions = _positions(names)
    if positions is None:
        order = names
    elif sorted(positions.values()) == list(range(len(names))):
        order = sorted(names, key=positions.__getitem__)
    else:
        raise ConfigurationError(
            f"model '{config.name}': the numbers after __ in the inputs {names} must be 0 to {len(names) - 1}"
        )
    return lambda tensors: ([tensors[name] for name in order if name in tensors], {})


def _by_argument(arguments: list[Argument], tensors: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """By position up to the first argument that is left out, from there by name."""
    positional: list[Any] = []
    for argument in arguments:
        if argument.name not in tensors or argument.kind == "keyword":
            break
        positional.append(tensors[argument.name])
    rest = {argument.name for argument in arguments[len(positional) :]}
    return positional, {name: tensor for name, tensor in tensors.items() if name in rest}


def output_positions(config: ModelConfig) -> dict[str, int]:
    """Where each output is in what `forward` returns, unless that is a dictionary."""
    names = [tensor.name for tensor in config.output]
    positions = _positions(names)
    return positions if positions is not None else {name: index for index, name in enumerate(names)}


def _positions(names: list[str]) -> dict[str, int] | None:
    """The positions that all names end in, or None."""
    matches = {name: _POSITION.fullmatch(name) for name in names}
    found = {name: int(match[1]) for name, match in matches.items() if match is not None}
    return found if names and len(found) == len(names) else None


def _torch_device(device: Device) -> str:
    if device.kind != "cuda":
        return "cpu"
    import torch

    if not torch.cuda.is_available() or device.index >= torch.cuda.device_count():
        raise ModelLoadError(f"PyTorch has no GPU {device.index} here: use KIND_CPU in instance_group")
    return f"cuda:{device.index}"


def _flag(config: ModelConfig, parameters: Mapping[str, str], key: str, *, default: bool) -> bool:
    text = parameters.get(key)
    if text is None:
        return default
    if text.lower() not in ("true", "false", "1", "0"):
        raise ConfigurationError(f"model '{config.name}': parameter {key}={text!r}: expected true or false")
    return text.lower() in ("true", "1")


def _set_threads(config: ModelConfig, parameters: Mapping[str, str]) -> None:
    """PyTorch's thread counts are the process's: the first model that sets one decides."""
    import torch

    for key, apply in (
        ("INTRA_OP_THREAD_COUNT", torch.set_num_threads),
        ("INTER_OP_THREAD_COUNT", torch.set_num_interop_threads),
    ):
        text = parameters.get(key)
        if text is None:
            continue
        if not text.isdigit() or int(text) < 1:
            raise ConfigurationError(f"model '{config.name}': parameter {key}={text!r}: expected a number from 1 on")
        count = int(text)
        if _thread_counts.setdefault(key, count) != count:
            logger.warning(
                "model %s: %s=%d has no effect, another model set %d", config.name, key, count, _thread_counts[key]
            )
            continue
        try:
            apply(count)
        except RuntimeError as error:
            logger.warning("model %s: %s=%d has no effect: %s", config.name, key, count, error)


def _short(error: Exception) -> str:
    """The lines of PyTorch's error that say what is wrong."""
    text = str(error).strip()
    return text if len(text) < 2000 else text[:500] + " … " + text[-1400:]
