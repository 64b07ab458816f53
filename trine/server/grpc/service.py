"""inference.GRPCInferenceService and grpc.health.v1.Health."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import DecodeError

from trine.core.errors import TrineError
from trine.server.describe import EXTENSIONS, model_metadata, model_statistics, served
from trine.server.errors import Code, ServerError
from trine.server.grpc import status
from trine.server.grpc.codec import Decoder, Encoder
from trine.server.grpc.infer import StreamSession, find_model, grpc_status, infer
from trine.server.grpc.reflection import reflection_methods
from trine.server.grpc.stream import Buffer, CallError, Method, Stream
from trine.server.proto import health, pb
from trine.server.request import InferRequest
from trine.server.settings import LogSettings, TraceSettings
from trine.server.shared_memory import SharedMemory
from trine.server.traffic import KEY_HEADER, VERSION_HEADER

logger = logging.getLogger("trine.server.grpc")
_SERVICE = "/inference.GRPCInferenceService/"
_HEALTH = "/grpc.health.v1.Health/"
_CONTEXT = ("traceparent", KEY_HEADER, VERSION_HEADER)
RESTRICTED_PREFIX = "triton-grpc-protocol-"

Answer = Any
Handler = Callable[["GrpcApi", Any], "Answer | Awaitable[Answer]"]


class GrpcApi:
    """The methods. restricted: API group to the metadata key and the value that open it."""

    def __init__(
        self,
        repository: Any,
        *,
        server_name: str = "triton",
        server_version: str = "",
        memory: SharedMemory | None = None,
        trace_settings: TraceSettings | None = None,
        log_settings: LogSettings | None = None,
        traces: Any = None,
        restricted: Mapping[str, tuple[str, str]] | None = None,
        forward_headers: str = "",
    ) -> None:
        self.repository = repository
        self.server_name = server_name
        self.server_version = server_version
        self.memory = memory if memory is not None else SharedMemory()
        self.trace_settings = trace_settings if trace_settings is not None else TraceSettings()
        self.log_settings = log_settings if log_settings is not None else LogSettings()
        self.traces = traces
        self.restricted = dict(restricted or {})
        self.decoder = Decoder()
        self.encoder = Encoder(self.memory, repository)
        self._forward = re.compile(forward_headers, re.IGNORECASE) if forward_headers else None
        self._tasks: set[asyncio.Task[None]] = set()

    def methods(self) -> dict[str, Method]:
        """Every method by its path."""
        found = {
            _SERVICE + "ModelInfer": Method(unary=lambda stream, data: infer(self, stream, data), group="inference"),
            _SERVICE + "ModelStreamInfer": Method(
                begin=lambda stream: (StreamSession(self, stream), None)[1], group="inference"
            ),
            _HEALTH + "Watch": Method(unary=self._watch_health, group="health"),
            **reflection_methods(),
        }
        for name, (group, request, handler) in _UNARY.items():
            path = _HEALTH + "Check" if name == "Check" else _SERVICE + name
            found[path] = Method(unary=self._unary(request, handler), group=group)
        return found

    def allow(self, group: str, metadata: Mapping[str, str]) -> None:
        """Raises CallError where a group is restricted and the call does not open it."""
        needed = self.restricted.get(group)
        if needed is not None:
            key, value = needed
            if metadata.get((RESTRICTED_PREFIX + key).lower()) != value:
                raise CallError(
                    status.UNAVAILABLE, f"This protocol is restricted, expecting header '{RESTRICTED_PREFIX}{key}'"
                )

    def prepare(self, request: InferRequest, stream: Stream) -> None:
        """What the metadata adds to a request."""
        metadata = stream.metadata
        if self._forward is not None:
            for name, value in metadata.items():
                if self._forward.fullmatch(name):
                    request.parameters[name] = value
        for name in _CONTEXT:
            if name in metadata:
                request.context = {**(request.context or {}), name: metadata[name]}
        if self.traces is not None and self.traces.enabled:
            self.traces.start(request)

    def _unary(self, request_type: Any, handler: Handler) -> Callable[[Stream, Buffer], None]:
        def call(stream: Stream, data: Buffer) -> None:
            try:
                request = request_type.FromString(bytes(data))
                if handler in _OF_MODELS and self.repository.wants_load(request.name):
                    kept = bytes(data)
                    self.repository.load_then(request.name, lambda: call(stream, kept))
                    return
                answer = handler(self, request)
                if isinstance(answer, Awaitable):
                    self._later(stream, answer)
                else:
                    _reply(stream, answer)
            except DecodeError as error:
                stream.finish(status.INVALID_ARGUMENT, f"the request is no {request_type.DESCRIPTOR.name}: {error}")
            except TrineError as error:
                stream.finish(grpc_status(error), error.message)

        return call

    def _later(self, stream: Stream, answer: Awaitable[Answer]) -> None:
        async def wait() -> None:
            try:
                _reply(stream, await answer)
            except TrineError as error:
                stream.finish(grpc_status(error), error.message)
            except Exception as error:
                logger.error("gRPC call %s failed", stream.head.path, exc_info=error)
                stream.finish(status.INTERNAL, f"an error of the server itself ({type(error).__name__})")

        task = asyncio.ensure_future(wait())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _watch_health(self, stream: Stream, data: Buffer) -> None:
        """The state now and whenever it changes."""
        last: list[int] = []

        def look() -> None:
            if stream.closed:
                return
            answer = health.HealthCheckResponse(status=_health_status(self, ""))
            if last != [answer.status]:
                last[:] = [answer.status]
                encoded = answer.SerializeToString()
                stream.send((encoded,), len(encoded))
            asyncio.get_running_loop().call_later(1.0, look)

        look()


def _reply(stream: Stream, answer: Any) -> None:
    data = answer.SerializeToString()
    stream.reply((data,), len(data))


# The methods of one message and one answer.


def _health_status(api: GrpcApi, service: str) -> int:
    if service not in ("", "inference.GRPCInferenceService"):
        return int(health.HealthCheckResponse.SERVICE_UNKNOWN)
    states = health.HealthCheckResponse
    return int(states.SERVING if api.repository.ready else states.NOT_SERVING)


def _check(api: GrpcApi, request: Any) -> Any:
    state = _health_status(api, request.service)
    if state == health.HealthCheckResponse.SERVICE_UNKNOWN:
        raise ServerError(f"there is no service '{request.service}'", Code.NOT_FOUND)
    return health.HealthCheckResponse(status=state)


def _server_live(api: GrpcApi, request: Any) -> Any:
    return pb.ServerLiveResponse(live=api.repository.live)


def _server_ready(api: GrpcApi, request: Any) -> Any:
    return pb.ServerReadyResponse(ready=api.repository.ready)


async def _model_ready(api: GrpcApi, request: Any) -> Any:
    return pb.ModelReadyResponse(ready=await api.repository.ask_ready(request.name, request.version))


def _server_metadata(api: GrpcApi, request: Any) -> Any:
    return pb.ServerMetadataResponse(name=api.server_name, version=api.server_version, extensions=EXTENSIONS)


def _model_metadata(api: GrpcApi, request: Any) -> Any:
    model = find_model(api, request.name, request.version)
    return pb.ModelMetadataResponse(**model_metadata(model, request.version))


def _model_config(api: GrpcApi, request: Any) -> Any:
    return pb.ModelConfigResponse(config=find_model(api, request.name, request.version).config)


_OF_MODELS = (_model_metadata, _model_config)
"""Besides inference, what loads a model on demand."""


def _model_statistics(api: GrpcApi, request: Any) -> Any:
    found = model_statistics(served(api.repository, request.name, request.version))
    return json_format.ParseDict(found, pb.ModelStatisticsResponse())


def _repository_index(api: GrpcApi, request: Any) -> Any:
    entries = api.repository.index(request.ready)
    return pb.RepositoryIndexResponse(
        models=[
            {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason}
            for entry in entries
        ]
    )


async def _repository_load(api: GrpcApi, request: Any) -> Any:
    config: str | None = None
    files: dict[str, bytes] = {}
    for key, value in request.parameters.items():
        chosen = value.WhichOneof("parameter_choice")
        if key == "config" and chosen == "string_param":
            config = value.string_param
        elif key.startswith("file:") and chosen == "bytes_param":
            files[key.removeprefix("file:")] = value.bytes_param
        elif key == "config" or key.startswith("file:"):
            expected = "string_param" if key == "config" else "bytes_param"
            raise ServerError(f"invalid value type for load parameter '{key}', expected {expected}.")
        else:
            raise ServerError(f"unrecognized load parameter '{key}'.")
    await api.repository.load(request.model_name, config, files or None)
    return pb.RepositoryModelLoadResponse()


async def _repository_unload(api: GrpcApi, request: Any) -> Any:
    dependents = False
    for key, value in request.parameters.items():
        if key != "unload_dependents":
            raise ServerError(f"unrecognized unload parameter '{key}'.")
        if value.WhichOneof("parameter_choice") != "bool_param":
            raise ServerError("invalid value type for 'unload_dependents' parameter, expected bool_param.")
        dependents = value.bool_param
    await api.repository.unload(request.model_name, dependents)
    return pb.RepositoryModelUnloadResponse()


def _system_status(api: GrpcApi, request: Any) -> Any:
    regions = api.memory.status(request.name or None, "system")
    response = pb.SystemSharedMemoryStatusResponse()
    for region in regions:
        response.regions[region["name"]].CopyFrom(pb.SystemSharedMemoryStatusResponse.RegionStatus(**region))
    return response


def _system_register(api: GrpcApi, request: Any) -> Any:
    api.memory.register_system(request.name, request.key, request.offset, request.byte_size)
    return pb.SystemSharedMemoryRegisterResponse()


def _system_unregister(api: GrpcApi, request: Any) -> Any:
    api.memory.unregister(request.name or None, "system")
    return pb.SystemSharedMemoryUnregisterResponse()


def _cuda_status(api: GrpcApi, request: Any) -> Any:
    api.memory.status(request.name or None, "cuda")
    return pb.CudaSharedMemoryStatusResponse()


def _cuda_register(api: GrpcApi, request: Any) -> Any:
    api.memory.register_cuda(request.name, request.raw_handle, request.device_id, request.byte_size)
    return pb.CudaSharedMemoryRegisterResponse()


def _cuda_unregister(api: GrpcApi, request: Any) -> Any:
    api.memory.unregister(request.name or None, "cuda")
    return pb.CudaSharedMemoryUnregisterResponse()


def _trace_setting(api: GrpcApi, request: Any) -> Any:
    name = request.model_name
    if name and not any(entry.name == name for entry in api.repository.index()):
        raise ServerError(f"Request for unknown model : {name}")
    changes: dict[str, object] = {}
    for key, setting in request.settings.items():
        values = list(setting.value)
        changes[key] = None if not values else values if key == "trace_level" or len(values) > 1 else values[0]
    if changes:
        api.trace_settings.update(name, changes)
    response = pb.TraceSettingResponse()
    for key, value in api.trace_settings.describe(name).items():
        response.settings[key].value.extend(value if isinstance(value, list) else [value])
    return response


def _log_settings(api: GrpcApi, request: Any) -> Any:
    changes: dict[str, object] = {}
    for key, setting in request.settings.items():
        chosen = setting.WhichOneof("parameter_choice")
        changes[key] = getattr(setting, chosen) if chosen else None
    if changes:
        api.log_settings.update(changes)
    response = pb.LogSettingsResponse()
    for key, value in api.log_settings.describe().items():
        field = (
            "bool_param" if isinstance(value, bool) else "uint32_param" if isinstance(value, int) else "string_param"
        )
        setattr(response.settings[key], field, value)
    return response


_UNARY: dict[str, tuple[str, Any, Handler]] = {
    "Check": ("health", health.HealthCheckRequest, _check),
    "ServerLive": ("health", pb.ServerLiveRequest, _server_live),
    "ServerReady": ("health", pb.ServerReadyRequest, _server_ready),
    "ModelReady": ("health", pb.ModelReadyRequest, _model_ready),
    "ServerMetadata": ("metadata", pb.ServerMetadataRequest, _server_metadata),
    "ModelMetadata": ("metadata", pb.ModelMetadataRequest, _model_metadata),
    "ModelConfig": ("model-config", pb.ModelConfigRequest, _model_config),
    "ModelStatistics": ("statistics", pb.ModelStatisticsRequest, _model_statistics),
    "RepositoryIndex": ("model-repository", pb.RepositoryIndexRequest, _repository_index),
    "RepositoryModelLoad": ("model-repository", pb.RepositoryModelLoadRequest, _repository_load),
    "RepositoryModelUnload": ("model-repository", pb.RepositoryModelUnloadRequest, _repository_unload),
    "SystemSharedMemoryStatus": ("shared-memory", pb.SystemSharedMemoryStatusRequest, _system_status),
    "SystemSharedMemoryRegister": ("shared-memory", pb.SystemSharedMemoryRegisterRequest, _system_register),
    "SystemSharedMemoryUnregister": ("shared-memory", pb.SystemSharedMemoryUnregisterRequest, _system_unregister),
    "CudaSharedMemoryStatus": ("shared-memory", pb.CudaSharedMemoryStatusRequest, _cuda_status),
    "CudaSharedMemoryRegister": ("shared-memory", pb.CudaSharedMemoryRegisterRequest, _cuda_register),
    "CudaSharedMemoryUnregister": ("shared-memory", pb.CudaSharedMemoryUnregisterRequest, _cuda_unregister),
    "TraceSetting": ("trace", pb.TraceSettingRequest, _trace_setting),
    "LogSettings": ("logging", pb.LogSettingsRequest, _log_settings),
}
