"""The messages: the shipped descriptors are those of the sources, and agree with Triton's own client."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from trine.server import proto
from trine.server.proto import FILES, pb

SOURCES = Path(proto.__file__).parent


def test_the_descriptors_are_compiled_from_the_sources(tmp_path: Path) -> None:
    from grpc_tools import protoc

    target = tmp_path / "descriptors.binpb"
    names = [path.name for path in SOURCES.glob("*.proto")]
    assert protoc.main(["protoc", f"-I{SOURCES}", f"--descriptor_set_out={target}", *names]) == 0
    compiled = descriptor_pb2.FileDescriptorSet.FromString(target.read_bytes())
    assert {file.name: file.SerializeToString() for file in compiled.file} == FILES, "run `make proto`"


def comparable(file: descriptor_pb2.FileDescriptorProto) -> descriptor_pb2.FileDescriptorProto:
    file.name = ""
    del file.dependency[:]
    messages = list(file.message_type)
    for message in messages:
        messages.extend(message.nested_type)
        for field in message.field:
            field.ClearField("json_name")
    return file


@pytest.mark.parametrize(
    ("module", "name"), [("model_config_pb2", "model_config.proto"), ("service_pb2", "inference.proto")]
)
def test_messages_are_those_of_the_client(module: str, name: str) -> None:
    """Whatever the client library defines has the same number and type here. Both live in this process."""
    import importlib

    theirs = descriptor_pb2.FileDescriptorProto()
    importlib.import_module(f"tritonclient.grpc.{module}").DESCRIPTOR.CopyToProto(theirs)
    ours = descriptor_pb2.FileDescriptorProto.FromString(FILES[name])
    assert comparable(ours) == comparable(theirs)


def test_enums_and_nested_messages() -> None:
    assert pb.DataType.Value("TYPE_FP32") == pb.TYPE_FP32 == 11
    assert pb.ModelInstanceGroup(kind=pb.ModelInstanceGroup.KIND_CPU).kind == 2
    assert pb.ModelConfig.FromString(pb.ModelConfig(name="m").SerializeToString()).name == "m"
