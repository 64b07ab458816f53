"""grpc.reflection: tools such as grpcurl ask which services there are, and for their descriptors."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError

from trine.server.grpc import status
from trine.server.grpc.stream import Buffer, CallError, Method, Stream
from trine.server.proto import FILES, pool, reflection, reflection_v1alpha

SERVICES = (
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
    "inference.GRPCInferenceService",
)


def reflection_methods() -> dict[str, Method]:
    return {
        f"/{package}.ServerReflection/ServerReflectionInfo": Method(begin=_session(messages))
        for package, messages in (
            ("grpc.reflection.v1", reflection),
            ("grpc.reflection.v1alpha", reflection_v1alpha),
        )
    }


def _session(messages: Any) -> Any:
    def begin(stream: Stream) -> None:
        def answer(data: Buffer) -> None:
            try:
                request = messages.ServerReflectionRequest.FromString(bytes(data))
            except DecodeError as error:
                raise CallError(status.INVALID_ARGUMENT, f"no ServerReflectionRequest: {error}") from None
            encoded = respond(messages, request).SerializeToString()
            stream.send((encoded,), len(encoded))

        stream.on_message = answer
        stream.on_half_close = stream.finish

    return begin


def respond(messages: Any, request: Any) -> Any:
    """The answer to one question."""
    response = messages.ServerReflectionResponse(valid_host=request.host, original_request=request)
    asked = request.WhichOneof("message_request")
    try:
        if asked == "list_services":
            for name in SERVICES:
                response.list_services_response.service.add(name=name)
        elif asked == "file_by_filename":
            _add_file(response, pool.FindFileByName(request.file_by_filename))
        elif asked == "file_containing_symbol":
            _add_file(response, pool.FindFileContainingSymbol(request.file_containing_symbol))
        else:
            response.error_response.error_code = status.UNIMPLEMENTED
            response.error_response.error_message = "the messages of this server have no extensions"
    except KeyError as error:
        response.error_response.error_code = status.NOT_FOUND
        response.error_response.error_message = str(error)
    return response


def _add_file(response: Any, file: Any) -> None:
    """A file and those that it imports."""
    names = [file.name, *[other.name for other in file.dependencies]]
    response.file_descriptor_response.file_descriptor_proto.extend(FILES[name] for name in names)
