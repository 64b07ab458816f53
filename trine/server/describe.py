"""What the server says about itself and its models: the same dictionaries become JSON and protobuf messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from trine.server.configuration.types import datatype_name
from trine.server.errors import ServerError
from trine.server.statistics import Duration, ModelStatistics

EXTENSIONS = (
    "classification",
    "sequence",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "system_shared_memory",
    "cuda_shared_memory",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)


def model_metadata(model: Any, version: str = "") -> dict[str, Any]:
    """Name, versions (the one asked for, or all ready ones), platform, inputs and outputs of a served model."""
    config = model.config
    lead = [-1] if config.max_batch_size > 0 else []
    return {
        "name": model.name,
        "versions": [version] if version else list(model.versions),
        "platform": config.platform or config.backend,
        "inputs": [_tensor(tensor, lead) for tensor in config.input],
        "outputs": [_tensor(tensor, lead) for tensor in config.output],
    }


def _tensor(tensor: Any, lead: list[int]) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": datatype_name(tensor.data_type), "shape": [*lead, *tensor.dims]}


def message_to_dict(message: Any) -> dict[str, Any]:
    """A message as Triton writes it in JSON: fields in their order, defaults filled, integers as numbers.

    What has presence (messages, members of a oneof) is left out where it is not set.
    """
    return {
        field.name: _field(field, getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
        if not field.has_presence or message.HasField(field.name)
    }


def _field(field: Any, value: Any) -> Any:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        inner = kind.fields_by_name["value"]
        return {str(key): _one(inner, value[key]) for key in sorted(value)}
    if field.is_repeated:
        return [_one(field, item) for item in value]
    return _one(field, value)


def _one(field: Any, value: Any) -> Any:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return message_to_dict(value)
    if field.type == FieldDescriptor.TYPE_ENUM:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known is not None else value
    if field.type == FieldDescriptor.TYPE_BYTES:
        return value.decode("latin-1")
    return value


def _duration(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": duration.ns}


_RESPONSE_PARTS = ("compute_infer", "compute_output", "success", "fail", "empty_response", "cancel")
_BATCH_PARTS = ("compute_input", "compute_infer", "compute_output")
_REQUEST_PARTS = ("success", "fail", "queue", *_BATCH_PARTS, "cache_hit", "cache_miss")


def served(repository: Any, name: str, version: str) -> list[Any]:
    """The models that a question for statistics means: all, one's versions, or one version. ServerError: not found."""
    everything: list[Any] = repository.models()
    if not name:
        return everything
    found = [model for model in everything if model.name == name]
    if not found:
        raise ServerError(f"requested model '{name}' is not available")
    if version:
        found = [model for model in found if model.version == version]
        if not found:
            raise ServerError(f"requested model version is not available for model '{name}'")
    return found


def model_statistics(models: Iterable[Any]) -> dict[str, Any]:
    """The statistics of served models."""
    return {"model_stats": [_model_statistics(model.name, model.version, model.statistics) for model in models]}


def _model_statistics(name: str, version: str, statistics: ModelStatistics) -> dict[str, Any]:
    return {
        "name": name,
        "version": version,
        "last_inference": statistics.last_inference_ms,
        "inference_count": statistics.inference_count,
        "execution_count": statistics.execution_count,
        "inference_stats": {part: _duration(getattr(statistics, part)) for part in _REQUEST_PARTS},
        "response_stats": {
            str(index): {part: _duration(getattr(response, part)) for part in _RESPONSE_PARTS}
            for index, response in sorted(statistics.responses.items())
        },
        "batch_stats": [
            {"batch_size": rows, **{part: _duration(getattr(batch, part)) for part in _BATCH_PARTS}}
            for rows, batch in sorted(statistics.batches.items())
        ],
        "memory_usage": [],
    }
