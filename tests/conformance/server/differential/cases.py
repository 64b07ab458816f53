"""The requests of the differential test: the same list for both servers, in this order."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from tests.conformance.server.differential.models import DATATYPES

JSON_IS_400 = "malformed or mistyped JSON is the client's mistake: 400, Triton says 500"
COUNTED_DIFFERENTLY = {
    ("failing 1", "fail"): (0, 1, "a request that the model answers with an error has failed"),
    ("failing 1", "success"): (1, 0, "a request that the model answers with an error has failed"),
    ("types 1", "fail"): (1, 0, "an answer that JSON can't hold was computed well"),
    ("simple 1", "inference_count"): (122, 121, "one request is refused that Triton takes: more contents than inputs"),
    ("simple 1", "execution_count"): (56, 55, "one request is refused that Triton takes: more contents than inputs"),
    ("simple 1", "success"): (56, 55, "one request is refused that Triton takes: more contents than inputs"),
}
"""What the statistics of the whole run differ in: Triton's count, ours, and why."""
STRICTER = "Triton takes it silently; here it is refused with its reason"
MALFORMED_PROTOBUF = "a message that is none is the client's mistake: INVALID_ARGUMENT"
GENERATE_STATUS = "Triton has sent 200 before it knows; here the status is 400"
NO_SUCH_OPTION = "an option that is not known is refused, not ignored"
LOAD_IS_400 = "a load that can't be is the client's mistake (400), not the server's (500)"


@dataclass(frozen=True)
class Case:
    """A request. difference: why the answers differ, empty where they must not; text: if an error's text counts."""

    name: str
    protocol: str
    method: str
    path: str = ""
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    difference: str = ""
    text: bool = True


NUMBERS = list(range(16))


def tensor(name: str, shape: Sequence[int], datatype: str, data: Any = None, **parameters: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"name": name, "shape": list(shape), "datatype": datatype}
    if data is not None:
        made["data"] = data
    if parameters:
        made["parameters"] = parameters
    return made


def pair(rows: int = 1, *, data: Any = None) -> list[dict[str, Any]]:
    values = data if data is not None else NUMBERS * rows
    return [tensor("INPUT0", [rows, 16], "INT32", values), tensor("INPUT1", [rows, 16], "INT32", values)]


def http(name: str, path: str, body: Any = None, *, method: str = "", **options: Any) -> Case:
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    return Case(name, "http", method or ("GET" if body is None else "POST"), path, data, **options)


def binary_body(
    inputs: Sequence[tuple[str, Sequence[int], str, bytes]], rest: dict[str, Any]
) -> tuple[bytes, dict[str, str]]:
    described = [tensor(name, shape, kind, binary_data_size=len(data)) for name, shape, kind, data in inputs]
    head = json.dumps({"inputs": described, **rest}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    return head + b"".join(data for *_, data in inputs), headers


def raw_of(kind: str, values: Sequence[Any]) -> bytes:
    if kind == "BYTES":
        encoded = [value if isinstance(value, bytes) else str(value).encode() for value in values]
        return b"".join(len(item).to_bytes(4, "little") + item for item in encoded)
    dtypes = {"BOOL": "?", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
    size = {"8": 1, "6": 2, "2": 4, "4": 8}
    dtype = dtypes.get(kind) or f"<{'u' if kind[0] == 'U' else 'i'}{size[kind[-1]]}"
    return np.array(values, dtype=dtype).tobytes()


def sample(kind: str) -> list[Any]:
    if kind == "BYTES":
        return ["", "plain", "zwölf", 'with "quotes" and \\']
    if kind == "BOOL":
        return [True, False, True]
    if kind.startswith("FP"):
        return [0.0, -1.5, 0.1, 65504.0]
    bits = int(kind.strip("UINT"))
    return [0, 2**bits - 1, 7] if kind[0] == "U" else [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, -7]


def information() -> Iterator[Case]:
    for path in (
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/stats/ready",
        "/v2/nothing",
        "/nothing",
        "/",
    ):
        yield http(f"GET {path}", path)
    models = ("simple", "versions", "types", "repeat", "accumulate", "text", "ensemble", "nobody")
    for model in models:
        for suffix in (
            "",
            "/ready",
            "/versions/1",
            "/versions/1/ready",
            "/versions/9",
            "/versions/9/ready",
            "/versions/x",
        ):
            yield http(f"GET {model}{suffix}", f"/v2/models/{model}{suffix}")
        yield http(f"config of {model}", f"/v2/models/{model}/versions/9/config")
        yield http(f"stats of version 9 of {model}", f"/v2/models/{model}/versions/9/stats")
    yield http("versions 2", "/v2/models/versions/versions/2")
    yield http("versions 2 ready", "/v2/models/versions/versions/2/ready")
    for path, method in (
        ("/v2", "POST"), ("/v2/health/live", "POST"), ("/v2/models/simple", "POST"), ("/v2/models/simple/infer", "GET"),
        ("/v2/models/simple/infer", "PUT"), ("/v2/models/simple/generate", "GET"), ("/v2/repository/index", "GET"),
    ):  # fmt: skip
        yield http(f"{method} {path}", path, method=method)
    yield http("index", "/v2/repository/index", {})
    yield http("index, ready", "/v2/repository/index", {"ready": True})
    yield http("index without body", "/v2/repository/index", b"", method="POST")
    for kind in ("systemsharedmemory", "cudasharedmemory"):
        yield http(f"{kind} status", f"/v2/{kind}/status")
        yield http(f"{kind} of nobody", f"/v2/{kind}/region/r/status")
        yield http(f"{kind} unregister", f"/v2/{kind}/unregister", b"", method="POST")
        yield http(f"{kind} unregister one", f"/v2/{kind}/region/r/unregister", b"", method="POST")
    register = "/v2/systemsharedmemory/region/r/register"
    yield http(
        "register nothing",
        register,
        {"key": "/trine_no_such", "offset": 0, "byte_size": 64},
        difference="an object that is not there is the client's mistake (400), not the server's (500)",
    )
    yield http("register without size", register, {"key": "/trine_no_such", "offset": 0})
    yield http("register without key", register, {"offset": 0, "byte_size": 64})
    cuda = {"raw_handle": {"b64": "AAAA"}, "device_id": 0, "byte_size": 64}
    yield http("cuda register", "/v2/cudasharedmemory/region/r/register", cuda)
    yield http("load nobody", "/v2/repository/models/nobody/load", b"", method="POST", difference=LOAD_IS_400)
    yield http("unload nobody", "/v2/repository/models/nobody/unload", b"", method="POST")


def settings() -> Iterator[Case]:
    yield http("trace", "/v2/trace/setting")
    yield http("trace of simple", "/v2/models/simple/trace/setting")
    yield http("trace of nobody", "/v2/models/nobody/trace/setting", {"trace_rate": "7"})
    for name, body, difference in (
        ("levels without a file", {"trace_level": ["TIMESTAMPS"]}, ""),
        ("unknown level", {"trace_level": ["BAD"]}, STRICTER),
        ("rate as number", {"trace_rate": -3}, JSON_IS_400),
        ("file", {"trace_file": "x"}, ""),
        ("unknown setting", {"bogus": "x"}, NO_SUCH_OPTION),
        ("rate", {"trace_rate": "9"}, ""),
        ("back", {"trace_rate": None}, ""),
    ):
        yield http(f"trace {name}", "/v2/trace/setting", body, difference=difference)
    yield http("trace rate of simple", "/v2/models/simple/trace/setting", {"trace_rate": "7"})
    yield http("trace rate of simple back", "/v2/models/simple/trace/setting", {"trace_rate": None})
    yield http("logging", "/v2/logging")
    for name, body, difference in (
        ("verbose", {"log_verbose_level": 1}, ""),
        ("quiet", {"log_verbose_level": 0, "log_format": "ISO8601"}, ""),
        ("default", {"log_format": "default"}, ""),
        ("bad format", {"log_format": "bad"}, ""),
        ("file", {"log_file": "bad"}, ""),
        ("info as number", {"log_info": 1}, JSON_IS_400),
        ("unknown", {"bogus": 1}, NO_SUCH_OPTION),
    ):
        yield http(f"logging {name}", "/v2/logging", body, difference=difference)


INFER = "/v2/models/simple/infer"


def inference() -> Iterator[Case]:
    for rows in range(1, 10):
        yield http(f"simple of {rows}", INFER, {"inputs": pair(rows)})
    yield http("no row", INFER, {"inputs": pair(0)}, text=False)
    nothing, headers = binary_body([("text_input", [0, 1], "BYTES", b"")], {})
    yield http("no row of text", "/v2/models/text/infer", nothing, headers=headers)
    for output in ({"name": "OUTPUT0"}, {"name": "OUTPUT1"}, {"name": "OUTPUT1", "parameters": {"binary_data": True}}):
        yield http(f"output {output}", INFER, {"inputs": pair(), "outputs": [output], "id": "an id"})
    for count in (1, 2, 5, 16, 20):
        for name in ("OUTPUT0", "OUTPUT1"):
            output = {"name": name, "parameters": {"classification": count}}
            yield http(f"{count} classes of {name}", INFER, {"inputs": pair(2), "outputs": [output]})
    yield http(
        "the same output twice", INFER, {"inputs": pair(), "outputs": [{"name": "OUTPUT0"}, {"name": "OUTPUT0"}]}
    )
    twice = [{"name": "OUTPUT0", "parameters": {"classification": 2}}, {"name": "OUTPUT0"}]
    yield http("once in classes, once in values", INFER, {"inputs": pair(), "outputs": twice})
    yield http("no outputs", INFER, {"inputs": pair(), "outputs": []})
    yield http("unknown output", INFER, {"inputs": pair(), "outputs": [{"name": "NOPE"}]})
    for rows in (1, 3):
        data = np.arange(16 * rows, dtype=np.int32).tobytes()
        tensors = [("INPUT0", [rows, 16], "INT32", data), ("INPUT1", [rows, 16], "INT32", data)]
        listed = {"outputs": [{"name": "OUTPUT1", "parameters": {"binary_data": True}}]}
        for rest in ({}, {"parameters": {"binary_data_output": True}}, listed):
            body, headers = binary_body(tensors, rest)
            yield http(f"binary of {rows}, {rest}", INFER, body, headers=headers)
        outputs = [{"name": "OUTPUT0", "parameters": {"binary_data": False}}, {"name": "OUTPUT1"}]
        mixed = {"parameters": {"binary_data_output": True}, "outputs": outputs}
        body, headers = binary_body(tensors, mixed)
        yield http(f"mixed outputs of {rows}", INFER, body, headers=headers)
    for kind in DATATYPES:
        values = sample(kind)
        data = raw_of(kind, values)
        for binary_output in (False, True):
            rest = {"parameters": {"binary_data_output": binary_output}}
            inputs = [tensor(f"IN_{kind}", [len(values)], kind, values)]
            yield http(
                f"{kind} in JSON, binary output {binary_output}", "/v2/models/types/infer", {"inputs": inputs, **rest}
            )
            body, headers = binary_body([(f"IN_{kind}", [len(values)], kind, data)], rest)
            yield http(
                f"{kind} in binary, binary output {binary_output}", "/v2/models/types/infer", body, headers=headers
            )
        empty, headers = binary_body([(f"IN_{kind}", [0], kind, b"")], {})
        yield http(f"no {kind}", "/v2/models/types/infer", empty, headers=headers)
    for version in ("", "/versions/1", "/versions/3", "/versions/2", "/versions/9"):
        yield http(f"versions{version}", f"/v2/models/versions{version}/infer", {"inputs": pair()})
    floats = [1e39, 0.1, 1e-3, 1e20, 123456789, 5, -0.0]
    yield http("floats", "/v2/models/identity/infer", {"inputs": [tensor("INPUT0", [7], "FP32", floats)]})
    yield http(
        "nested", "/v2/models/matrix/infer", {"inputs": [tensor("INPUT0", [1, 2, 2], "FP32", [[[1, 2], [3, 4]]])]}
    )
    yield http("flat", "/v2/models/matrix/infer", {"inputs": [tensor("INPUT0", [1, 2, 2], "FP32", [1, 2, 3, 4])]})
    members = [tensor("A", [1, 16], "INT32", NUMBERS), tensor("B", [1, 16], "INT32", NUMBERS)]
    yield http("ensemble", "/v2/models/ensemble/infer", {"inputs": members, "id": "e"})
    wanted = [{"name": "C", "parameters": {"classification": 3}}]
    yield http("classes of an ensemble", "/v2/models/ensemble/infer", {"inputs": members, "outputs": wanted})
    yield http("ensemble without B", "/v2/models/ensemble/infer", {"inputs": members[:1]})
    yield http("failing", "/v2/models/failing/infer", {"inputs": [tensor("IN", [1], "INT32", [1])]})
    yield http("decoupled", "/v2/models/repeat/infer", {"inputs": [tensor("IN", [1], "INT32", [1])]})
    for kind, pack in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        body = pack(json.dumps({"inputs": pair()}).encode())
        yield http(f"{kind} request", INFER, body, headers={"Content-Encoding": kind})
        yield http(f"{kind} answer", INFER, {"inputs": pair()}, headers={"Accept-Encoding": kind})
    yield http("br request", INFER, b"{}", headers={"Content-Encoding": "br"})
    raw = {"Inference-Header-Content-Length": "0"}
    yield http("raw", "/v2/models/identity/infer", bytes(64), headers=raw)
    yield http("raw matrix", "/v2/models/matrix/infer", bytes(32), headers=raw)
    yield http("raw of two inputs", INFER, bytes(64), headers=raw)


def refusals() -> Iterator[Case]:
    one, two = pair()
    for name, inputs in (
        ("one input", [one]),
        ("no input", []),
        ("an input twice", [one, one]),
        ("an unknown input", [one, {**two, "name": "X"}]),
        ("three inputs", [one, two, {**two, "name": "X"}]),
        ("another datatype", [{**one, "datatype": "FP32"}, two]),
        ("no datatype of the protocol", [{**one, "datatype": "BOGUS"}, two]),
        ("FP16 in JSON", [{**one, "datatype": "FP16"}, two]),
        (
            "another shape",
            [tensor("INPUT0", [1, 8], "INT32", NUMBERS[:8]), tensor("INPUT1", [1, 8], "INT32", NUMBERS[:8])],
        ),
        ("one dimension", [tensor("INPUT0", [16], "INT32", NUMBERS), tensor("INPUT1", [16], "INT32", NUMBERS)]),
        ("other rows", [*pair(2)[:1], two]),
        ("no data", [{"name": "INPUT0", "shape": [1, 16], "datatype": "INT32"}, two]),
        ("data and size", [{**one, "parameters": {"binary_data_size": 64}}, two]),
    ):
        text = name not in ("another shape", "three inputs", "data and size", "one dimension", "other rows")
        yield http(f"refused: {name}", INFER, {"inputs": inputs}, text=text)
        yield http(f"refused with id: {name}", INFER, {"inputs": inputs, "id": "mine"}, text=text)
    for name, inputs in (
        ("too few values", [{**one, "data": [1]}, two]),
        ("too many values", [{**one, "data": [*NUMBERS, 1]}, two]),
        ("strings for numbers", [{**one, "data": ["a"] * 16}, two]),
        ("fractions for integers", [{**one, "data": [0.5] * 16}, two]),
        ("a negative dimension", [{**one, "shape": [1, -16]}, two]),
        ("no shape", [{"name": "INPUT0", "datatype": "INT32", "data": NUMBERS}, two]),
        ("no name", [{"shape": [1, 16], "datatype": "INT32", "data": NUMBERS}, two]),
        ("no datatype", [{"name": "INPUT0", "shape": [1, 16], "data": NUMBERS}, two]),
        ("a number", 5),
    ):
        yield http(f"mistyped: {name}", INFER, {"inputs": inputs}, difference=JSON_IS_400)
    for name, body in (
        ("empty object", b"{}"),
        ("array", b"[]"),
        ("null", b"null"),
        ("broken", b"{bad"),
        ("cut", b'{"inputs":['),
    ):
        yield http(f"malformed: {name}", INFER, body, difference=JSON_IS_400)
    yield http("empty body", INFER, b"", method="POST", text=False)
    yield http("inputs that are numbers", INFER, {"inputs": [5]}, text=False)
    for name, parameters, difference in (
        ("reserved", {"triton_x": 1}, ""),
        ("array", {"a": [1]}, ""),
        ("null", {"d": None}, ""),
        ("negative priority", {"priority": -1}, JSON_IS_400),
        ("text as priority", {"priority": "x"}, JSON_IS_400),
        ("text as timeout", {"timeout": "x"}, JSON_IS_400),
        ("fraction as sequence", {"sequence_id": 1.5}, JSON_IS_400),
        ("number as start", {"sequence_start": 1}, JSON_IS_400),
    ):
        yield http(f"parameter: {name}", INFER, {"inputs": pair(), "parameters": parameters}, difference=difference)
    yield http(
        "parameters of every kind", INFER, {"inputs": pair(), "parameters": {"a": 1, "b": "x", "c": True, "e": 0.5}}
    )
    yield http("number as id", INFER, {"inputs": pair(), "id": 5}, difference=JSON_IS_400)
    for length in ("5", "-1", "1000000"):
        headers = {"Inference-Header-Content-Length": length}
        yield http(f"header length {length}", INFER, b"{}", headers=headers)
    yield http("header length x", INFER, b"{}", headers={"Inference-Header-Content-Length": "x"}, text=False)
    data = bytes(64)
    for name, size, content in (("short", 64, data[:32]), ("long", 64, data * 2), ("odd", 63, data[:63])):
        described = [tensor("INPUT0", [16], "FP32", binary_data_size=size)]
        head = json.dumps({"inputs": described}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        yield http(
            f"binary: {name}", "/v2/models/identity/infer", head + content, headers=headers, text=name == "short"
        )
    for name, content in (("cut length", b"\1\0"), ("cut text", b"\5\0\0\0ab"), ("extra", raw_of("BYTES", ["a", "b"]))):
        body, headers = binary_body([("IN_BYTES", [1], "BYTES", content)], {})
        yield http(f"strings: {name}", "/v2/models/types/infer", body, headers=headers, text=False)
    yield http("infer on nobody", "/v2/models/nobody/infer", {"inputs": []})
    inputs = [tensor("INPUT0", [1, 16], "INT32", shared_memory_region="none", shared_memory_byte_size=64), two]
    wanted = {"name": "OUTPUT0", "parameters": {"shared_memory_region": ""}}
    yield http("no region", INFER, {"inputs": pair(), "outputs": [wanted]})
    wanted = {"name": "OUTPUT0", "parameters": {"shared_memory_region": None}}
    yield http("null as region", INFER, {"inputs": pair(), "outputs": [wanted]}, difference=JSON_IS_400)
    wanted = {"name": "OUTPUT0", "parameters": {"other": True}}
    yield http("an unknown output parameter", INFER, {"inputs": pair(), "outputs": [wanted]})
    yield http("a region that is not there", INFER, {"inputs": inputs}, text=False)


def sequences() -> Iterator[Case]:
    def step(name: str, value: int, **parameters: Any) -> Case:
        body = {"inputs": [tensor("INPUT", [1, 1], "INT32", [value])], "parameters": parameters}
        return http(f"sequence: {name}", "/v2/models/accumulate/infer", body)

    yield step("without id", 1)
    yield step("without start", 1, sequence_id=77)
    yield step("start", 2, sequence_id=5, sequence_start=True)
    yield step("another", 40, sequence_id="text", sequence_start=True)
    yield step("middle", 3, sequence_id=5)
    yield step("end", 4, sequence_id=5, sequence_end=True)
    yield step("after the end", 4, sequence_id=5)
    yield step("the other's end", 2, sequence_id="text", sequence_end=True)


def generation() -> Iterator[Case]:
    for verb in ("generate", "generate_stream"):
        path = f"/v2/models/text/{verb}"
        for name, body in (
            ("text", {"text_input": "hello"}),
            ("text and limit", {"text_input": "hello", "max_tokens": 2}),
            ("id", {"text_input": "hello", "id": "mine"}),
            ("list", {"text_input": ["hello"]}),
            ("nested parameters", {"text_input": "hello", "parameters": {"a": 1}}),
            ("unknown key", {"text_input": "hello", "extra": 5}),
            ("no input", {}),
            ("array parameter", {"text_input": "hello", "extra": [1]}),
            ("object parameter", {"text_input": "hello", "extra": {"a": 1}}),
        ):
            yield http(f"{verb}: {name}", path, body)
        yield http(f"{verb}: mistyped", path, {"text_input": "a", "max_tokens": "x"}, difference=JSON_IS_400)
        yield http(f"{verb}: array", path, b"[1]", difference=JSON_IS_400)
        yield http(f"{verb}: broken", path, b"{bad", difference=JSON_IS_400)
        yield http(f"{verb}: gzip", path, b"{}", headers={"Content-Encoding": "gzip"})
        yield http(f"{verb} of nobody", f"/v2/models/nobody/{verb}", {"a": 1})
    for count in (0, 1, 2, 3):
        difference = "" if count == 1 else GENERATE_STATUS
        yield http(f"generate {count}", "/v2/models/repeat/generate", {"IN": count}, difference=difference)
        yield http(f"generate_stream {count}", "/v2/models/repeat/generate_stream", {"IN": count})
    yield http("generate_stream, then an error", "/v2/models/repeat/generate_stream", {"IN": -2})


def grpc_case(name: str, method: str, message: Any, **options: Any) -> Case:
    data = message if isinstance(message, bytes) else message.SerializeToString()
    return Case(f"gRPC {name}", "grpc", method, body=data, **options)


def add_sub(rows: int = 1, *, model: str = "simple", typed: bool = False, **fields: Any) -> Any:
    request = pb.ModelInferRequest(model_name=model, **fields)
    data = np.array(NUMBERS * rows, np.int32)
    for name in ("INPUT0", "INPUT1"):
        made = request.inputs.add(name=name, datatype="INT32", shape=[rows, 16])
        if typed:
            made.contents.int_contents.extend(data.tolist())
        else:
            request.raw_input_contents.append(data.tobytes())
    return request


_FIELDS = {"BOOL": "bool", "INT64": "int64", "UINT64": "uint64", "FP32": "fp32", "FP64": "fp64", "BYTES": "bytes"}


def grpc_information() -> Iterator[Case]:
    for method in ("ServerLive", "ServerReady", "ServerMetadata"):
        yield grpc_case(method, method, getattr(pb, f"{method}Request")())
    for model in ("simple", "versions", "types", "repeat", "ensemble", "nobody"):
        for version in ("", "1", "9"):
            for method in ("ModelReady", "ModelMetadata"):
                request = getattr(pb, f"{method}Request")(name=model, version=version)
                yield grpc_case(f"{method} {model} {version}", method, request)
    yield grpc_case("index", "RepositoryIndex", pb.RepositoryIndexRequest())
    yield grpc_case("stats of nobody", "ModelStatistics", pb.ModelStatisticsRequest(name="nobody"))
    yield grpc_case("config of nobody", "ModelConfig", pb.ModelConfigRequest(name="nobody"))
    for kind in ("System", "Cuda"):
        yield grpc_case(
            f"{kind} status", f"{kind}SharedMemoryStatus", getattr(pb, f"{kind}SharedMemoryStatusRequest")()
        )
        one = getattr(pb, f"{kind}SharedMemoryStatusRequest")(name="r")
        yield grpc_case(f"{kind} of nobody", f"{kind}SharedMemoryStatus", one)
    yield grpc_case("unload nobody", "RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="nobody"))
    yield grpc_case("trace", "TraceSetting", pb.TraceSettingRequest())
    yield grpc_case("logging", "LogSettings", pb.LogSettingsRequest())


def grpc_inference() -> Iterator[Case]:
    for rows in (1, 2, 8, 9):
        yield grpc_case(f"simple of {rows}", "ModelInfer", add_sub(rows))
        yield grpc_case(f"typed simple of {rows}", "ModelInfer", add_sub(rows, typed=True, id="an id"))
    for version in ("1", "3", "2", "9", "x", "-1"):
        yield grpc_case(f"version {version}", "ModelInfer", add_sub(model="versions", model_version=version))
    for count in (1, 3, 20):
        request = add_sub(2)
        request.outputs.add(name="OUTPUT0").parameters["classification"].int64_param = count
        yield grpc_case(f"{count} classes", "ModelInfer", request)
    for kind in DATATYPES:
        values = sample(kind)
        request = pb.ModelInferRequest(model_name="types")
        request.inputs.add(name=f"IN_{kind}", datatype=kind, shape=[len(values)])
        raw = pb.ModelInferRequest()
        raw.CopyFrom(request)
        raw.raw_input_contents.append(raw_of(kind, values))
        yield grpc_case(f"{kind} raw", "ModelInfer", raw)
        if kind == "FP16":
            continue
        field = _FIELDS.get(kind) or ("uint" if kind[0] == "U" else "int")
        typed = [value.encode() for value in values] if kind == "BYTES" else values
        getattr(request.inputs[0].contents, f"{field}_contents").extend(typed)
        yield grpc_case(f"{kind} typed", "ModelInfer", request)


def grpc_refusals() -> Iterator[Case]:
    yield grpc_case("no message", "ModelInfer", b"\xff\xff\xff", difference=MALFORMED_PROTOBUF)
    yield grpc_case("unknown model", "ModelInfer", add_sub(model="nobody"))
    yield grpc_case("decoupled", "ModelInfer", pb.ModelInferRequest(model_name="repeat"), text=False)
    missing = add_sub()
    del missing.inputs[1:]
    del missing.raw_input_contents[1:]
    yield grpc_case("one input", "ModelInfer", missing)
    mixed = add_sub(typed=True)
    mixed.raw_input_contents.append(bytes(64))
    yield grpc_case("mixed contents", "ModelInfer", mixed, text=False)
    short = add_sub()
    short.raw_input_contents[1] = bytes(60)
    yield grpc_case("short contents", "ModelInfer", short, text=False)
    fewer = add_sub()
    del fewer.raw_input_contents[1:]
    yield grpc_case("fewer contents", "ModelInfer", fewer, text=False)
    more = add_sub()
    more.raw_input_contents.append(bytes(64))
    yield grpc_case("more contents", "ModelInfer", more, difference=STRICTER)
    wrong = add_sub()
    wrong.inputs[0].datatype = "FP32"
    yield grpc_case("another datatype", "ModelInfer", wrong)
    wrong = add_sub()
    wrong.inputs[0].shape[1] = 8
    yield grpc_case("another shape", "ModelInfer", wrong, text=False)
    output = add_sub(id="mine")
    output.outputs.add(name="NOPE")
    yield grpc_case("unknown output", "ModelInfer", output)
    for name, parameters in (
        ("priority as text", {"priority": {"string_param": "x"}}),
        ("sequence as fraction", {"sequence_id": {"double_param": 0.5}}),
        ("start as number", {"sequence_start": {"int64_param": 1}}),
    ):
        request = pb.ModelInferRequest(model_name="nobody", parameters={})
        wrong = add_sub()
        for key, value in parameters.items():
            request.parameters[key].CopyFrom(pb.InferParameter(**value))
            wrong.parameters[key].CopyFrom(pb.InferParameter(**value))
        yield grpc_case(f"{name} to nobody", "ModelInfer", request)
        yield grpc_case(name, "ModelInfer", wrong, text=False)
    nothing = add_sub()
    del nothing.raw_input_contents[:]
    yield grpc_case("no contents", "ModelInfer", nothing)
    region = add_sub()
    region.inputs[0].parameters["shared_memory_region"].string_param = "none"
    yield grpc_case("a region without size", "ModelInfer", region)
    own = add_sub()
    own.parameters["binary_data_output"].bool_param = True
    yield grpc_case("a parameter of HTTP", "ModelInfer", own)
    reserved = add_sub()
    reserved.parameters["triton_x"].int64_param = 1
    yield grpc_case("reserved parameter", "ModelInfer", reserved)
    empty = add_sub()
    empty.parameters["x"].Clear()
    yield grpc_case("parameter without value", "ModelInfer", empty, text=False)


def grpc_streams() -> Iterator[Case]:
    """Each body is the messages of one stream, with their lengths before them."""

    def framed(messages: Sequence[Any]) -> bytes:
        parts = [message.SerializeToString() for message in messages]
        return b"".join(len(part).to_bytes(4, "little") + part for part in parts)

    def repeat(count: int, *, empty_final: bool = False) -> Any:
        request = pb.ModelInferRequest(model_name="repeat", id=f"r{count}")
        request.inputs.add(name="IN", datatype="INT32", shape=[1])
        request.raw_input_contents.append(np.array([count], np.int32).tobytes())
        if empty_final:
            request.parameters["triton_enable_empty_final_response"].bool_param = True
        return request

    for name, messages in (
        ("nothing", []),
        ("simple twice", [add_sub(id="a"), add_sub(2, id="b")]),
        ("repeat 3", [repeat(3)]),
        ("repeat 3 with its end", [repeat(3, empty_final=True)]),
        ("repeat 0", [repeat(0)]),
        ("repeat 0 with its end", [repeat(0, empty_final=True)]),
        ("repeat with an error", [repeat(-1)]),
        ("unknown model, then a good one", [add_sub(model="nobody", id="x"), add_sub(id="y")]),
        ("failing", [add_sub(9, id="x")]),
    ):
        yield Case(f"gRPC stream: {name}", "stream", "ModelStreamInfer", body=framed(messages))


def all_cases() -> list[Case]:
    groups = (
        information, settings, inference, refusals, sequences, generation, grpc_information, grpc_inference,
        grpc_refusals, grpc_streams,
    )  # fmt: skip
    return [case for group in groups for case in group()]
