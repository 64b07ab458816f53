"""Whether a completed configuration can be served; ConfigurationError names the key, its value and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from trine.core.errors import ConfigurationError
from trine.server.configuration.complete import ENSEMBLE, PLATFORM_BACKENDS
from trine.server.proto import pb

ModelConfig = Any

_DELAY = 1  # ModelQueuePolicy.TimeoutAction.DELAY
_CORRELATION_TYPES = ("TYPE_UINT64", "TYPE_INT64", "TYPE_UINT32", "TYPE_INT32", "TYPE_STRING")


def check_config(config: ModelConfig, *, gpus: int = 0) -> None:
    """Raise for what no model can have: contradictions, values out of range, references to nothing."""
    name = config.name
    if not name:
        raise ConfigurationError("model configuration must specify 'name'")
    if config.max_batch_size < 0:
        raise ConfigurationError(
            f"'max_batch_size' must be non-negative value for {name}, it is {config.max_batch_size}"
        )
    _check_backend(config)
    _check_tensors(config)
    _check_batch_tensors(config)
    if config.HasField("dynamic_batching"):
        _check_dynamic_batching(config)
    if config.HasField("sequence_batching"):
        _check_sequence_batching(config)
    if config.HasField("ensemble_scheduling"):
        _check_ensemble(config)
    else:
        _check_instances(config, gpus)
    if config.response_cache.enable and config.model_transaction_policy.decoupled:
        raise ConfigurationError(
            f"Response Cache does not currently support model {name} with 'decoupled' transaction policy. "
            "Please disable the response cache."
        )


def _check_backend(config: ModelConfig) -> None:
    if config.platform == ENSEMBLE:
        if config.backend:
            raise ConfigurationError(
                f"Ensemble model '{config.name}' must have platform type 'ensemble' and empty backend type"
            )
        if not config.HasField("ensemble_scheduling"):
            raise ConfigurationError(
                f"ensemble scheduling must be set for ensemble {config.name} whose platform is {ENSEMBLE}"
            )
        return
    if config.HasField("ensemble_scheduling"):
        raise ConfigurationError(
            f"ensemble scheduling cannot be set for model '{config.name}' whose platform is not {ENSEMBLE}"
        )
    if not config.backend:
        raise ConfigurationError(
            f"must specify 'platform' or 'backend' for '{config.name}': set backend in config.pbtxt, or put a "
            "model file of a known name (model.onnx, model.pt, model.py, model.xml, …) into the version directory"
            + (f" (platform {config.platform!r} is unknown)" if config.platform else "")
        )
    expected = PLATFORM_BACKENDS.get(config.platform)
    if expected is not None and config.backend in PLATFORM_BACKENDS.values() and expected != config.backend:
        raise ConfigurationError(
            f"unexpected 'platform' and 'backend' pair, got:{config.platform}, {config.backend}; "
            f"platform {config.platform} goes with backend {expected}"
        )


def _check_tensors(config: ModelConfig) -> None:
    for kind, tensors in (("input", config.input), ("output", config.output)):
        seen: set[str] = set()
        for tensor in tensors:
            if not tensor.name:
                raise ConfigurationError(f"model {kind} must specify 'name' for {config.name}")
            if tensor.name in seen:
                raise ConfigurationError(f"model {kind} '{tensor.name}' is given twice for {config.name}")
            seen.add(tensor.name)
            if tensor.data_type == 0:
                raise ConfigurationError(
                    f"model {kind} '{tensor.name}' must specify 'data_type' for {config.name}, for example TYPE_FP32"
                )
            _check_dims(config, kind, tensor)
    for tensor in config.input:
        _check_input_format(config, tensor)


def _check_dims(config: ModelConfig, kind: str, tensor: Any) -> None:
    where = f"model {kind} '{tensor.name}'"
    dims = list(tensor.dims)
    if not dims:
        raise ConfigurationError(f"{where} must specify 'dims' for {config.name}")
    if any(dim < 1 and dim != -1 for dim in dims):
        raise ConfigurationError(
            f"{where} dimension must be integer >= 1, or -1 to indicate a variable-size "
            f"dimension for {config.name}, dims are {dims}"
        )
    if not tensor.HasField("reshape"):
        return
    shape = list(tensor.reshape.shape)
    if any(dim < 1 and dim != -1 for dim in shape):
        raise ConfigurationError(
            f"{where} reshape dimensions must be integer >= 1, or -1 to indicate a variable-size "
            f"dimension for {config.name}, the reshape is {shape}"
        )
    if not shape and (dims != [1] or config.max_batch_size == 0):
        raise ConfigurationError(
            f"{where} cannot have empty reshape for non-batching model or dims {dims} other than [ 1 ] for "
            f"{config.name}"
        )
    if _parts(dims) != _parts(shape):
        raise ConfigurationError(f"{where} has different size for dims {dims} and reshape {shape} for {config.name}")


def _parts(dims: list[int]) -> list[int]:
    """Elements between variable dimensions: what a reshape must leave as it is."""
    parts = [1]
    for dim in dims:
        if dim == -1:
            parts.append(1)
        else:
            parts[-1] *= dim
    return parts


def _check_input_format(config: ModelConfig, tensor: Any) -> None:
    if tensor.format and len(tensor.dims) != 3:
        raise ConfigurationError(f"model input '{tensor.name}' NHWC/NCHW require 3 dims for {config.name}")
    if tensor.is_shape_tensor and tensor.allow_ragged_batch:
        raise ConfigurationError(f"shape tensor '{tensor.name}' can not be ragged for {config.name}")
    if tensor.is_shape_tensor and config.backend not in ("tensorrt", "plan"):
        raise ConfigurationError(
            f"shape tensors are only supported for TensorRT platform, model input '{tensor.name}' for {config.name}"
        )


def _check_batch_tensors(config: ModelConfig) -> None:
    inputs = {tensor.name for tensor in config.input}
    outputs = {tensor.name for tensor in config.output}
    for kind, tensors in (("batch input", config.batch_input), ("batch output", config.batch_output)):
        for tensor in tensors:
            label = type(tensor).Kind.Name(tensor.kind)
            if len(tensor.source_input) != 1:
                raise ConfigurationError(
                    f"{kind} kind '{label}' expects 1 source input, got {len(tensor.source_input)} for {config.name}"
                )
            for source in tensor.source_input:
                if source not in inputs:
                    raise ConfigurationError(f"unknown source input name '{source}' for {config.name}")
    for tensor in config.batch_input:
        if tensor.data_type not in (pb.DataType.Value("TYPE_INT32"), pb.DataType.Value("TYPE_FP32")):
            raise ConfigurationError(f"batch input data type must be TYPE_INT32 or TYPE_FP32 for {config.name}")
    for tensor in config.batch_output:
        for target in tensor.target_name:
            if target not in outputs:
                raise ConfigurationError(f"unknown target output name '{target}' for {config.name}")
        if len(set(tensor.target_name)) != len(tensor.target_name):
            raise ConfigurationError(f"target output name can only be specified once for {config.name}")


def _check_preferred(config: ModelConfig, sizes: Iterable[int], what: str) -> None:
    for size in sizes:
        if size <= 0:
            raise ConfigurationError(f"{what} must be positive for {config.name}, it is {size}")
        if size > config.max_batch_size:
            raise ConfigurationError(
                f"{what} must be <= max batch size for {config.name}: {size} > {config.max_batch_size}"
            )


def _check_dynamic_batching(config: ModelConfig) -> None:
    batching = config.dynamic_batching
    _check_preferred(config, batching.preferred_batch_size, "dynamic batching preferred size")
    levels = batching.priority_levels
    if levels and not 1 <= batching.default_priority_level <= levels:
        raise ConfigurationError(
            f"default priority level must be in range [1, {levels}] for {config.name}: "
            f"default_priority_level is {batching.default_priority_level}"
        )
    if levels:
        for level in batching.priority_queue_policy:
            if not 1 <= level <= levels:
                raise ConfigurationError(
                    f"priority queue policy must have priority level in range [1, {levels}] for {config.name}: "
                    f"it has {level}"
                )
    if not batching.preserve_ordering:
        return
    if levels > 1:
        raise ConfigurationError(
            f"Only one priority level is allowed when 'preserve_ordering' is true for {config.name}"
        )
    for policy in (batching.default_queue_policy, *batching.priority_queue_policy.values()):
        if policy.default_timeout_microseconds and policy.timeout_action == _DELAY:
            raise ConfigurationError(
                f"Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true for {config.name}"
            )


def _check_sequence_batching(config: ModelConfig) -> None:
    batching = config.sequence_batching
    if config.response_cache.enable:
        raise ConfigurationError(
            f"Response Cache does not currently support model {config.name} with sequence batching scheduler. "
            "Please disable the response cache."
        )
    if batching.HasField("oldest"):
        _check_preferred(config, batching.oldest.preferred_batch_size, "sequence batching preferred batch size")
    if batching.HasField("direct") and not 0.0 <= batching.direct.minimum_slot_utilization <= 1.0:
        raise ConfigurationError(
            f"sequence batching minimum slot utilization must be in range (0.0, 1.0] for {config.name}: "
            f"it is {batching.direct.minimum_slot_utilization}"
        )
    seen: dict[int, str] = {}
    for control_input in batching.control_input:
        if not control_input.name:
            raise ConfigurationError(f"sequence batching control tensor must have a name for {config.name}")
        if len(control_input.control) > 1:
            raise ConfigurationError(
                f"sequence batching control tensor '{control_input.name}' is specified for multiple control kinds for "
                f"{config.name}: give each kind a tensor of its own"
            )
        for control in control_input.control:
            _check_control(config, control_input.name, control, seen)
    _check_states(config)


def _check_control(config: ModelConfig, tensor_name: str, control: Any, seen: dict[int, str]) -> None:
    kind = type(control).Kind.Name(control.kind)
    if control.kind in seen:
        raise ConfigurationError(
            f"sequence batching specifies multiple {kind} tensors for {config.name}: "
            f"'{seen[control.kind]}' and '{tensor_name}'"
        )
    seen[control.kind] = tensor_name
    if kind == "CONTROL_SEQUENCE_CORRID":
        if pb.DataType.Name(control.data_type) not in _CORRELATION_TYPES:
            raise ConfigurationError(
                f"unexpected data type for control {kind} for {config.name}. Allowed data types are "
                f"{', '.join(_CORRELATION_TYPES)}"
            )
        return
    given = [field for field in ("int32_false_true", "fp32_false_true", "bool_false_true") if getattr(control, field)]
    if len(given) != 1:
        raise ConfigurationError(
            f"sequence batching must specify exactly one of 'int32_false_true', 'fp32_false_true' and "
            f"'bool_false_true' for {kind} for {config.name}, it has {given or 'none'}"
        )
    if len(getattr(control, given[0])) != 2:
        raise ConfigurationError(
            f"sequence batching control '{given[0]}' must have exactly 2 entries for {kind} for {config.name}"
        )


def _check_states(config: ModelConfig) -> None:
    for state in config.sequence_batching.state:
        if not state.input_name or not state.output_name:
            raise ConfigurationError(
                f"sequence batching state must have 'input_name' and 'output_name' for {config.name}"
            )
        if state.data_type == 0 or not state.dims:
            raise ConfigurationError(
                f"sequence batching state '{state.input_name}' must have 'data_type' and 'dims' for {config.name}"
            )
        if len(state.initial_state) > 1:
            raise ConfigurationError(
                f"sequence batching state '{state.input_name}' has {len(state.initial_state)} initial states for "
                f"{config.name}, give one"
            )
        if not state.initial_state and not state.use_same_buffer_for_input_output and -1 in state.dims:
            continue
        for initial in state.initial_state:
            if -1 in initial.dims:
                raise ConfigurationError(
                    f"initial state dims of state '{state.input_name}' can't be variable for {config.name}: "
                    f"{list(initial.dims)}"
                )


def _check_instances(config: ModelConfig, gpus: int) -> None:
    kinds = pb.ModelInstanceGroup.Kind
    for group in config.instance_group:
        if group.kind == kinds.Value("KIND_GPU"):
            if not gpus:
                raise ConfigurationError(
                    f"instance group {group.name} of model {config.name} has kind KIND_GPU but no GPUs are available: "
                    "use KIND_CPU, or KIND_AUTO to take what is there"
                )
            for device in group.gpus:
                if not 0 <= device < gpus:
                    raise ConfigurationError(
                        f"instance group {group.name} of model {config.name} specifies invalid or unsupported gpu id "
                        f"{device}; this machine has {gpus}"
                    )
        elif group.gpus:
            raise ConfigurationError(
                f"instance group {group.name} of model {config.name} has kind {kinds.Name(group.kind)} but specifies "
                "one or more GPUs: use KIND_GPU, or leave gpus out"
            )
        if group.count < 1:
            raise ConfigurationError(
                f"instance group {group.name} of model {config.name} has count {group.count}, at least 1 is needed"
            )


def _check_ensemble(config: ModelConfig) -> None:
    """The graph itself is checked where the members are known: scheduling/ensemble.py."""
    name = config.name
    if config.instance_group:
        raise ConfigurationError(f"instance group should not be specified for ensemble '{name}'")
    if config.HasField("optimization"):
        raise ConfigurationError(f"optimization should not be specified for ensemble '{name}'")
    if config.model_warmup:
        raise ConfigurationError(f"model_warmup can not be specified for ensemble '{name}'")
    if config.HasField("dynamic_batching") or config.HasField("sequence_batching"):
        raise ConfigurationError(f"ensemble '{name}' can't have dynamic_batching or sequence_batching: its members can")
    steps = config.ensemble_scheduling.step
    if not steps:
        raise ConfigurationError(f"must specify 'step' for ensemble '{name}'")
    for index, step in enumerate(steps):
        if not step.model_name:
            raise ConfigurationError(f"must specify 'model_name' in step {index} of ensemble '{name}'")
        if not step.input_map:
            raise ConfigurationError(f"must specify 'input_map' in step {index} of ensemble '{name}'")
        if not step.output_map:
            raise ConfigurationError(f"must specify 'output_map' in step {index} of ensemble '{name}'")
