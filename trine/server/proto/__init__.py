"""Protobuf messages of the server, in a pool of their own.

A client library in the same process (`tritonclient`) registers messages of the same names in protobuf's default pool;
two definitions in one pool would clash. `make proto` compiles the `.proto` files into `descriptors.binpb`.

    from trine.server.proto import pb

    config = pb.ModelConfig(name="m", max_batch_size=8)
    pb.DataType.Value("TYPE_FP32")  # enums: Name(number), Value(name), keys(), items()
"""

from __future__ import annotations

from importlib.resources import files
from types import SimpleNamespace
from typing import Any

from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

Message = Any
"""An instance of one of the message classes."""


def _load() -> tuple[DescriptorPool, dict[str, bytes]]:
    """The pool, and each file's serialized FileDescriptorProto by name."""
    described = descriptor_pb2.FileDescriptorSet.FromString(
        files(__package__).joinpath("descriptors.binpb").read_bytes()
    )
    own = DescriptorPool()
    serialized = {file.name: file.SerializeToString() for file in described.file}
    for content in serialized.values():
        own.AddSerializedFile(content)
    return own, serialized


pool, FILES = _load()


def messages(package: str) -> Any:
    """Everything that a protobuf package defines at top level, as attributes: message classes, enums, enum values."""
    found: dict[str, Any] = {}
    for name in FILES:
        file = pool.FindFileByName(name)
        if file.package != package:
            continue
        for message in file.message_types_by_name.values():
            found[message.name] = message_factory.GetMessageClass(message)
        for enum in file.enum_types_by_name.values():
            found[enum.name] = EnumTypeWrapper(enum)
            found |= {value.name: value.number for value in enum.values}
    return SimpleNamespace(**found)


pb: Any = messages("inference")
"""Package `inference`: ModelConfig, ModelInferRequest, …"""
health: Any = messages("grpc.health.v1")
reflection: Any = messages("grpc.reflection.v1")
reflection_v1alpha: Any = messages("grpc.reflection.v1alpha")
